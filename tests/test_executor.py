"""The plan executor: order, barriers, sleeping and waking, ends, forks, and what a row costs."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
from alarms import AlarmError, second_signal
from kernel_calls import ISAS, Fenced, library

from runtime.backends.cpu.abi import PLAN_BARRIER
from runtime.backends.cpu.compile import objects
from runtime.backends.cpu.run import executor
from runtime.backends.cpu.run.executor import ThreadTeam
from runtime.backends.plan.kernel import Kernel

WIDTH, ROUNDS = 1000, 150


@pytest.fixture(scope="module", autouse=True)
def compiled():
    library(ISAS[0]).prepare(Kernel.of(name) for name in ("executor", "gather_rows", "add"))


def loader(kernel: Kernel) -> int:
    return library(ISAS[0]).address(kernel)


class Chain:
    """x = x[permutation] + y, over and over: each row of the plan needs all of the one before."""

    def __init__(self, rounds: int = ROUNDS) -> None:
        rng = np.random.default_rng(1)
        self.ids = rng.permutation(WIDTH).astype(np.int32)
        self.y = rng.integers(-9, 9, (WIDTH, 1)).astype(np.float32)
        self.x, self.moved = np.zeros((WIDTH, 1), np.float32), np.zeros((WIDTH, 1), np.float32)
        self.live, self.rounds = np.array([WIDTH], np.int64), rounds
        gather = self._arguments("gather_rows", x=self.x, ids=self.ids, out=self.moved)
        add = self._arguments("add", x=self.moved, y=self.y, out=self.x)
        rows = [(loader(Kernel.of(n)), a.ctypes.data, PLAN_BARRIER) for n, a in (gather, add)]
        self.table = np.array(rows * rounds, np.int64)

    def _arguments(self, kernel: str, **arrays: np.ndarray) -> tuple[str, np.ndarray]:
        words = {name: a.ctypes.data for name, a in arrays.items()}
        words |= dict.fromkeys(("n", "x_stride", "y_stride", "out_stride"), 1)
        words["live"] = self.live.ctypes.data
        native = library(ISAS[0]).get(Kernel.of(kernel))
        words = {name: words[name] for name in native.arguments}
        setattr(self, kernel, np.array(list(words.values()), np.int64))
        return kernel, getattr(self, kernel)

    def run(self, team: ThreadTeam, profile: int = 0) -> None:
        team.run(self.table.ctypes.data, len(self.table), profile)

    def wanted(self, runs: int) -> np.ndarray:
        x = np.zeros_like(self.x)
        for _ in range(self.rounds * runs):
            x = x[self.ids] + self.y
        return x


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_row_sees_the_rows_before_it(threads):
    chain = Chain()
    with ThreadTeam(threads, loader) as team:
        for _ in range(5):
            chain.run(team)
    assert np.array_equal(chain.x, chain.wanted(5))


def test_threads_that_sleep_wake_up():
    chain = Chain(3)
    with ThreadTeam(2, loader) as team:
        for _ in range(4):
            chain.run(team)
            time.sleep(0.01)
    assert np.array_equal(chain.x, chain.wanted(4))


def test_a_team_ends_and_starts_again():
    chain, before = Chain(2), threading.active_count()
    team = ThreadTeam(3, loader)
    assert threading.active_count() == before, "threads start with the first plan"
    chain.run(team)
    assert threading.active_count() == before + 2
    for _ in range(2):
        team.close()
        assert threading.active_count() == before
    chain.run(team)
    team.close()
    assert np.array_equal(chain.x, chain.wanted(2))


def test_two_teams_at_once():
    chains = [Chain(60) for _ in range(2)]

    def work(chain: Chain) -> None:
        with ThreadTeam(2, loader) as team:
            for _ in range(3):
                chain.run(team)

    threads = [threading.Thread(target=work, args=(chain,)) for chain in chains]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for chain in chains:
        assert np.array_equal(chain.x, chain.wanted(3))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_signal_ends_a_long_plan_early(threads, alarm):
    chain = Chain()
    table = np.tile(chain.table, (120, 1))  # long beside a turn of a thread
    with ThreadTeam(threads, loader) as team:
        chain.run(team)
        started = time.perf_counter()
        team.run(table.ctypes.data, len(table), long=True)
        whole = time.perf_counter() - started
        for after in (0.05, 0.0001):  # 0.0001: about when it begins
            started = time.perf_counter()
            with pytest.raises(AlarmError):
                alarm(min(after, whole / 4))
                team.run(table.ctypes.data, len(table), long=True)
                time.sleep(1)
            assert time.perf_counter() - started < whole / 2
            chain.x[:] = 0
            chain.run(team)
            assert np.array_equal(chain.x, chain.wanted(1)), "the next plan is run as ever"


@pytest.mark.parametrize("threads", [1, 2])
def test_another_thread_ends_a_plan_early(threads):
    chain = Chain()
    table = np.tile(chain.table, (120, 1))
    with ThreadTeam(threads, loader) as team:
        team.abort()  # nothing is under way
        chain.run(team)
        assert np.array_equal(chain.x, chain.wanted(1))
        started = time.perf_counter()
        team.run(table.ctypes.data, len(table))
        whole = time.perf_counter() - started
        runner = threading.Thread(target=team.run, args=(table.ctypes.data, len(table)))
        started = time.perf_counter()
        runner.start()
        while runner.is_alive():
            time.sleep(0.001)
            team.abort()
        assert time.perf_counter() - started < whole / 2
        chain.x[:] = 0
        chain.run(team)
        assert np.array_equal(chain.x, chain.wanted(1)), "the next plan is run as ever"


def test_a_second_signal_does_not_let_two_plans_run_at_once(alarm, monkeypatch):
    chain = Chain()
    table = np.tile(chain.table, (120, 1))
    with ThreadTeam(2, loader) as team:
        second_signal(monkeypatch, executor.LongRun, "abort")
        with pytest.raises(AlarmError):
            alarm(0.02)
            team.run(table.ctypes.data, len(table), long=True)
        chain.run(team)  # after what is still under way
        for _ in range(2):
            chain.x[:] = 0
            chain.run(team)
            assert np.array_equal(chain.x, chain.wanted(1))


def test_an_interrupt_beside_the_end_of_a_run_is_heard():
    """One that comes when the lock is held already, and before the next line."""
    waiting = threading.Event()  # the run does not end before somebody waits for it
    run = executor.LongRun(lambda *_: waiting.wait(10), np.zeros(64, np.int64), 1, {})

    class Lock:
        def __init__(self, lock: Any) -> None:
            self.lock, self.raised, self.release = lock, False, lock.release

        def acquire(self, timeout: float) -> bool:
            waiting.set()
            got = self.lock.acquire(timeout=timeout)
            if got and not self.raised:
                self.raised = True
                raise AlarmError
            return got

    run._running = Lock(run._running)
    ended: list[type] = []

    def outcome() -> None:
        try:
            run.run()
        except AlarmError:
            run.abort()  # as the team does before its next plan
            ended.append(AlarmError)

    thread = threading.Thread(target=outcome, daemon=True)
    thread.start()
    thread.join(10)
    assert ended == [AlarmError]


@pytest.mark.parametrize("threads", [1, 2])
def test_profile_is_one_time_per_row_and_the_end(threads):
    chain = Chain(10)
    times = Fenced(1, 2 * (len(chain.table) + 1), dtype=np.int32)
    with ThreadTeam(threads, loader) as team:
        chain.run(team, times.address)
    assert times.strays(1) == 0
    stamps = np.ascontiguousarray(times.values).view(np.int64)[0]
    assert (np.diff(stamps) >= 0).all() and 0 < stamps[-1] - stamps[0] < 60e9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_has_threads_of_its_own():
    chain = Chain(5)
    with ThreadTeam(2, loader) as team:
        chain.run(team)
        child = os.fork()
        if child == 0:
            chain.run(team)
            team.close()
            os._exit(0 if np.array_equal(chain.x, chain.wanted(2)) else 1)
        assert os.waitpid(child, 0)[1] == 0
        chain.run(team)
    assert np.array_equal(chain.x, chain.wanted(2))


def test_an_impossible_team():
    with pytest.raises(ValueError, match="at least one thread"):
        ThreadTeam(0, loader)
    with ThreadTeam(2, loader) as team:
        team.run(0, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="load is not known here")
@pytest.mark.parametrize(("threads", "most_ns"), [(1, 100), (2, 1000)])
def test_what_a_row_costs(threads, most_ns):
    if (os.cpu_count() or 1) < threads:
        pytest.skip(f"needs {threads} processors")
    code = objects.compile_ir("define void @entry(i64 %a, i64 %b, i64 %c) { ret void }", ISAS[0])
    table = np.zeros((2000, 3), np.int64)
    table[:] = objects.load_object(code), 0, PLAN_BARRIER
    best = np.inf
    with ThreadTeam(threads, loader) as team:
        for _ in range(100):
            start = time.perf_counter_ns()
            team.run(table.ctypes.data, len(table))
            best = min(best, (time.perf_counter_ns() - start) / len(table))
            if best < most_ns:
                return
    if os.getloadavg()[0] > (os.cpu_count() or 1) - 0.5:
        pytest.skip(f"the machine is busy: {best:.0f} ns")
    assert best < most_ns
