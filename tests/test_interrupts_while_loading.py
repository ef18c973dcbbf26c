"""Ctrl-C while kernels compile or weights are packed: over at once, the cache whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.backends.cpu.compile.isa import selected
from runtime.backends.cpu.compile.library import Library
from runtime.backends.plan.entries import Entries
from runtime.backends.plan.kernel import Kernel

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 3.0  # 0.3 on an idle machine, and room for one that is shared

if sys.platform == "win32":
    pytest.skip("signals are sent otherwise there", allow_module_level=True)

COMPILE = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a runner may have it ignored
from pathlib import Path
from runtime.backends.cpu.compile.isa import selected
from runtime.backends.plan.kernel import Kernel
from runtime.backends.cpu.compile.library import Library
start = subprocess.Popen
def popen(*a, **k):
    process = start(*a, **k)
    os.write(1, b"%d\\n" % process.pid)  # whole: two threads start processes
    return process
subprocess.Popen = popen
kernels = [Kernel.of("pack_weights", format=f) for f in ("Q8_0", "Q4_0", "Q5_0", "Q4_1")]
kernels += [Kernel.of(n) for n in ("rms_norm", "top_k", "take", "l2_norm")]
kernels += [Kernel.of("attention", k_type=k, v_type="f16") for k in ("f32", "f16", "q8_0")]  # slow
try:
    Library(selected(), Path(sys.argv[1])).prepare(kernels)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(130)
"""


def _interrupt(program: str, *arguments: str, after: float, group: bool) -> tuple[str, float]:
    """What it printed, and seconds from a Ctrl-C to its end. group: as a terminal sends it."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    first = process.stdout.readline()  # something has begun
    time.sleep(after)
    at = time.monotonic()
    (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors == "", "nothing of the compile processes is shown"
    return first + rest, time.monotonic() - at


def _ends(pid: int) -> bool:
    """Whether a process is gone, or is within SECONDS: the system takes a while to end one that
    was killed, and nobody may ask how it ended."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
            if sys.platform == "linux" and ") Z " in Path(f"/proc/{pid}/stat").read_text():
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("group", [False, True], ids=["process", "terminal"])
@pytest.mark.parametrize("after", [0.0, 0.3, 1.5])
def test_compiling(tmp_path: Path, after: float, group: bool):
    printed, seconds = _interrupt(COMPILE, str(tmp_path), after=after, group=group)
    *processes, last = printed.split()
    assert last == "interrupted" and seconds < SECONDS
    assert processes and all(_ends(int(pid)) for pid in processes)
    names = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()]
    assert all(Entries(tmp_path).read(name) for name in names), "each entry is whole"
    library = Library(selected(), tmp_path)
    assert library.address(Kernel.of("pack_weights", format="Q8_0"))


LOAD = """
import signal, sys
from runtime.backends.cpu.compile.isa import selected
from runtime.backends.cpu.compile.objects import compile_ir, load_object

code = compile_ir("define void @entry(i64 %a, i64 %b, i64 %c) { ret void }", selected())
load_object(code)
def stop(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, stop)
interrupted = 0
for n in range(200):
    try:
        signal.setitimer(signal.ITIMER_REAL, 2e-5 * (n % 50 + 1))
        for _ in range(3):
            load_object(code)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        interrupted += 1
print(interrupted, flush=True)
"""


def test_loading_kernels():
    """LLVM is left whole wherever an interrupt comes."""
    ended = subprocess.run(
        [sys.executable, "-c", LOAD], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 0, ended.stderr[-500:]
    assert int(ended.stdout) > 20


def test_an_interrupt_in_a_callback_ends_the_processes(tmp_path: Path):
    """Or any exception, wherever the caller is when it comes."""
    program = COMPILE.replace(
        ".prepare(kernels)", ".prepare(kernels, lambda done, total, what: done and 1 / 0)"
    ).replace("except KeyboardInterrupt", "except ZeroDivisionError")
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 130, done.stderr
    *processes, last = done.stdout.split()
    assert last == "interrupted" and all(_ends(int(pid)) for pid in processes)


PACK = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import numpy as np, runtime
from runtime.backends.cpu.run.weights import WeightStore
path = sys.argv[1]
with runtime.load(path, context=64, progress=False) as model:
    wanted = model.eval([1, 2, 3])
begun = WeightStore.load
def load(self, buffers):
    print("packing", flush=True)
    while True:  # weights without an end
        yield from begun(self, buffers)
        self._made.clear()
WeightStore.load = load
try:
    runtime.load(path, context=64, progress=False)
except KeyboardInterrupt:
    WeightStore.load = begun
    with runtime.load(path, context=64, progress=False) as model:
        print(np.array_equal(model.eval([1, 2, 3]), wanted))
    sys.exit(130)
"""


def test_packing(small_model: Path):
    printed, seconds = _interrupt(PACK, str(small_model), after=0.2, group=False)
    assert printed == "packing\nTrue\n" and seconds < SECONDS


def test_no_call_packs_more_than_a_moment():
    """What one native call takes, since Python sees an interrupt only after it."""
    from runtime.backends.cpu.run import forms

    pieces = [*forms.pieces(3, 100_003, 2304), *forms.pieces(128, 2048, 2304)]
    assert all(count * (stop - first) * 2304 <= 17 << 20 for _, count, first, stop in pieces)
    rows = [(m + k, r) for m, n, a, b in forms.pieces(3, 40_003, 2304)
            for k in range(n) for r in range(a, b)]  # fmt: skip
    assert rows == [(m, r) for m in range(3) for r in range(40_003)]
