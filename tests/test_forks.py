"""Forks beside a running step, and threads that cannot start: right logits or one clear line.

Each case runs in a process of its own that is killed if it hangs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 60

if not hasattr(os, "fork"):
    pytest.skip("this system has no fork", allow_module_level=True)

# `busy` steps without a pause in another thread; `wanted` are the logits of IDS.
BEGIN = """
import faulthandler, multiprocessing, os, signal, sys, threading, time
import numpy as np
import runtime

IDS = [1, 2, 3, 4, 5, 6, 7, 8, 9]
model = runtime.load(sys.argv[1], threads=2)
wanted = model.eval(IDS)
long = [i % 70 for i in range(60)]
stop = False

def run():
    while not stop:
        with model.session() as session:
            session.eval(long, "none")
            for token in long[:9]:
                session.eval([token], "last")

busy = [threading.Thread(target=run, daemon=True) for _ in range(2)]
for thread in busy:
    thread.start()

def child(work):
    "The exit status of a forked child that does this; a child that hangs is killed."
    pid = os.fork()
    if pid == 0:
        signal.alarm(15)
        try:
            os._exit(0 if work() else 1)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(2)
    return os.waitpid(pid, 0)[1]
"""
END = """
stop = True
for thread in busy:
    thread.join()
assert np.array_equal(model.eval(IDS), wanted)
model.close()
print("done")
"""


def _run(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_child_computes_the_right_logits(small_model: Path):
    program = (
        BEGIN
        + """
for _ in range(25):
    assert child(lambda: np.array_equal(model.eval(IDS), wanted)) == 0
"""
        + END
    )
    assert _run(program, str(small_model)) == "done\n"


def test_a_session_that_was_in_a_step_is_as_before_it(hybrid_model: Path):
    """Or as after it: the fork comes in the middle of anything."""
    program = (
        BEGIN
        + """
session = model.session()
session.eval(long[:20], "none")
before = session.snapshot()
nexts = [model.eval([*long[:n], 7])[-1] for n in (20, 60)]
for _ in range(10):
    session.restore(before)
    thread = threading.Thread(target=session.eval, args=(long[20:60], "none"))
    thread.start()
    time.sleep(0.002 * np.random.default_rng(_).random())
    def work():
        n = len(session)
        return n in (20, 60) and np.array_equal(session.eval([7])[0], nexts[n > 20])
    status = child(work)
    thread.join()
    assert status == 0, status
"""
        + END
    )
    assert _run(program, str(hybrid_model)) == "done\n"


def test_a_process_of_multiprocessing(small_model: Path):
    program = (
        BEGIN
        + """
def evaluate(ids):
    return model.eval(ids)
context = multiprocessing.get_context("fork")
with context.Pool(2) as pool:
    results = pool.map_async(evaluate, [IDS] * 6).get(30)
assert all(np.array_equal(result, wanted) for result in results)
"""
        + END
    )
    assert _run(program, str(small_model)) == "done\n"


def test_forks_of_forks_and_models_loaded_in_a_child(small_model: Path):
    program = (
        BEGIN
        + """
def work():
    if child(lambda: np.array_equal(model.eval(IDS), wanted)):
        return False
    with runtime.load(sys.argv[1], threads=2) as other:
        return np.array_equal(other.eval(IDS), wanted)
for _ in range(3):
    assert child(work) == 0
assert child(lambda: model.close() or True) == 0, "closing needs no threads"
"""
        + END
    )
    assert _run(program, str(small_model)) == "done\n"


def test_a_lock_that_the_forking_thread_holds_stays_its_own(small_model: Path):
    program = """
import os
from runtime.backends import forks
lock, free = forks.lock(), forks.lock()
with lock:
    pid = os.fork()
if pid == 0:
    os._exit(0 if lock.acquire(blocking=False) and free.acquire(blocking=False) else 1)
print(os.waitpid(pid, 0)[1])
"""
    assert _run(program) == "0\n"


THREADS = """
import resource, sys, threading
import numpy as np
import runtime

IDS = [1, 2, 3, 4, 5]
with runtime.load(sys.argv[1], threads=1) as model:
    wanted = model.eval(IDS)
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + (700 << 20), resource.RLIM_INFINITY))

def line(work):
    try:
        work()
    except runtime.Error as error:
        return str(error)

threading.stack_size(256 << 20)  # two threads more and there is no room
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux")
def test_a_thread_that_cannot_start_is_one_line(small_model: Path):
    program = (
        THREADS
        + """
print(line(lambda: runtime.load(sys.argv[1], threads=8)))
threading.stack_size(0)
model = runtime.load(sys.argv[1], threads=2)
model.backend.team.close()
threading.stack_size(900 << 20)
for _ in range(3):
    print(line(lambda: model.eval(IDS)))
session = model.session()
print(line(lambda: session.eval(IDS)), len(session))
threading.stack_size(0)
assert np.array_equal(session.eval(IDS), wanted)
print(threading.active_count())
"""
    )
    lines = _run(program, str(small_model)).splitlines()
    assert "of 8 cannot be started (can't start new thread)" in lines[0]
    assert "give threads=" in lines[0]
    assert all("thread 2 of 2 cannot be started" in line for line in lines[1:5])
    assert lines[4].endswith(" 0") and lines[5] == "2"


def test_a_child_does_not_wait_for_what_another_thread_computes(small_model: Path):
    """A property that a thread computes during the fork; code that it links meanwhile."""
    program = (
        BEGIN
        + """
from runtime.backends.cpu.compile import objects
from runtime.backends.cpu.compile.isa import selected
from runtime.ops.cached import cached_property

code = objects.compile_ir("define void @entry(i64 %a, i64 %b, i64 %c) { ret void }", selected())
link_now = objects._link
def link_slowly(*arguments):
    time.sleep(0.02)
    return link_now(*arguments)
objects._link = link_slowly
class Slow:
    @cached_property
    def value(self):
        time.sleep(0.02)
        return 1
def compute():
    while not stop:
        Slow().value
def link():
    while not stop:
        objects.load_object(code)
for work in (compute, link):
    threading.Thread(target=work, daemon=True).start()
for _ in range(25):
    # in this thread: a new one may get the number of the one that held the lock, and pass
    assert child(lambda: Slow().value and objects._linked(code, "entry")) == 0
"""
        + END
    )
    assert _run(program, str(small_model)) == "done\n"
