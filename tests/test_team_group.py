"""Several teams led by one call: each its own table, a barrier and a sum between them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from alarms import AlarmError, second_signal
from kernel_calls import ISAS, library

from runtime.backends.cpu import CpuBackend
from runtime.backends.cpu.run import executor
from runtime.backends.cpu.run.executor import ThreadTeam
from runtime.backends.cpu.run.group import TeamGroup
from runtime.backends.cpu.run.table import Record, Table
from runtime.backends.plan.kernel import Kernel
from runtime.ops.errors import OptionError

ROWS, N, ROUNDS = 37, 45, 40  # a row has a part that fills no vector
TASKS = Path("/proc/self/task")
KERNELS = [Kernel.of(name) for name in ("executor", "lead_teams", "meet", "all_sum", "add")]


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    library(ISAS[0]).prepare(KERNELS)


def loader(kernel: Kernel) -> int:
    return library(ISAS[0]).address(kernel)


class Together:
    """x[k] = sum of all x + y[k], over and over, on teams of different sizes.

    Tables differ: team k adds y[k] in k + 1 steps of one row each.
    """

    def __init__(self, sizes: tuple[int, ...], rounds: int = ROUNDS) -> None:
        rng = np.random.default_rng(1)
        self.teams = [ThreadTeam(n, loader) for n in sizes]
        self.group = TeamGroup(self.teams)
        shape = len(sizes), ROWS, N
        self.x, self.total, self.last = (np.zeros(shape, np.float32) for _ in range(3))
        self.y = rng.integers(-9, 9, shape).astype(np.float32) * 2.0**-30
        self.live = np.array([ROWS], np.int64)
        self.parts = np.array([x.ctypes.data for x in self.x], np.int64)
        self.change(rounds)

    def change(self, rounds: int) -> None:
        """Other tables, of so many rounds."""
        self.rounds = rounds
        self.tables = [Table(self._rows(k)) for k in range(len(self.x))]

    def _rows(self, k: int) -> list[list[Record]]:
        total, y, x = self.total[k], self.y[k], self.x[k]
        rows = []
        for _ in range(self.rounds):
            parts = {"parts": self.parts, "n_parts": len(self.parts), "more": 0}
            summed = self._call("all_sum", x=x, out=total, meeting=self.group.meeting, **parts)
            rows.append([summed])  # when all parts are written
            rows.append([self._meet()])  # nobody reads them any more
            rows.append([self._call("add", x=total, y=y, out=x)])
            rows += [[self._call("add", x=x, y=y, out=x)]] * k
        return [*rows, [self._call("add", x=y, y=y, out=self.last[k])]]

    def _meet(self) -> Record:
        return library(ISAS[0]).address(Kernel.of("meet")), (0, self.group.meeting.ctypes.data)

    def _call(self, kernel: str, **given: int | np.ndarray) -> Record:
        strides = ("x_stride", "y_stride", "out_stride") if kernel == "add" else ()
        words = {"live": self.live, "n": N, **dict.fromkeys(strides, N)}
        found = library(ISAS[0]).get(Kernel.of(kernel))
        ordered = found.ordered(Kernel.of(kernel), words | given)
        return found.address, [a.ctypes.data if isinstance(a, np.ndarray) else a for a in ordered]

    def run(self, long: bool = False) -> None:
        self.group.run([table.records() for table in self.tables], long)

    def wanted(self) -> np.ndarray:
        x, counts = np.zeros_like(self.x), np.arange(1, len(self.x) + 1)
        for _ in range(self.rounds):
            total = x[0]
            for part in x[1:]:
                total = total + part
            x = total + self.y
            for _ in range(len(x) - 1):
                counts = counts - 1
                x = np.where((counts > 0)[:, None, None], x + self.y, x)
            counts = np.arange(1, len(x) + 1)
        return x

    def check(self) -> None:
        self.x[:] = 0
        self.run()
        np.testing.assert_array_equal(self.x, self.wanted())

    def close(self) -> None:
        self.group.close()
        for team in self.teams:
            team.close()


@pytest.fixture(params=[(1, 1), (2, 1), (1, 2, 3)], ids=str)
def together(request: pytest.FixtureRequest) -> Iterator[Together]:
    made = Together(request.param)
    yield made
    made.close()


def test_teams_with_tables_of_their_own_meet_and_sum(together: Together):
    for _ in range(5):
        together.check()
    time.sleep(0.01)  # they sleep
    together.check()


def test_a_team_runs_alone_in_between(together: Together):
    alone = Table([[together._call("add", x=together.y[0], y=together.y[0], out=together.x[0])]])
    for team in together.teams:
        together.check()
        team.run(*alone.records())
        np.testing.assert_array_equal(together.x[0], together.y[0] * 2)


def test_threads_are_those_of_the_teams_and_no_more():
    before = threading.active_count()
    made = Together((2, 3), 1)
    made.check()
    assert threading.active_count() == before + 4, "and the caller"
    made.close()
    assert threading.active_count() == before
    made.check()  # they start again
    made.close()


def test_a_signal_ends_all_plans(alarm):
    made = Together((2, 1, 2), 4000)
    made.run()  # threads start with it
    started = time.perf_counter()
    made.run(long=True)
    took = time.perf_counter() - started
    assert made.last.all(0).any()
    for after in (took / 8, 0.002, 0.0002):
        made.last[:] = 0
        with pytest.raises(AlarmError):
            alarm(min(after, took / 8))
            made.run(long=True)
            time.sleep(1)
        assert not made.last.any(), "the last kernel of each is left out"
        made.teams[1].run(*_nothing(made).records())
    made.change(3)
    made.check()
    made.close()


def test_another_thread_ends_all_plans():
    made = Together((2, 1, 2), 4000)
    made.run()
    made.last[:] = 0
    runner = threading.Thread(target=made.run)
    runner.start()
    while runner.is_alive():
        made.group.abort()
        time.sleep(0.0005)
    assert not made.last.any(), "the last kernel of each is left out"
    made.change(3)
    made.check()
    made.close()


def _nothing(made: Together) -> Table:
    return Table([[made._call("add", x=made.y[0], y=made.y[0], out=made.total[0])]])


def test_a_second_signal_does_not_let_plans_run_beside_each_other(alarm, monkeypatch):
    made = Together((2, 2), 20_000)
    made.run()
    second_signal(monkeypatch, executor.LongRun, "abort")
    with pytest.raises(AlarmError):
        alarm(0.02)
        made.run(long=True)
    made.teams[1].run(*_nothing(made).records())  # after what is still under way
    made.change(3)
    for _ in range(2):
        made.check()
    made.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_has_teams_of_its_own(together: Together):
    together.check()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            together.check()
            together.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    together.check()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be pinned here")
def test_threads_keep_to_their_cores(monkeypatch: pytest.MonkeyPatch):
    before = os.sched_getaffinity(0)
    core, made = max(before), Together((1,), 1)
    asked, set_affinity = [], os.sched_setaffinity
    monkeypatch.setattr(os, "sched_setaffinity", lambda *a: (asked.append(a), set_affinity(*a)))
    with ThreadTeam(3, loader, frozenset({core})) as team:
        tasks = set(TASKS.iterdir())
        team.run(*_nothing(made).records())
        new = set(TASKS.iterdir()) - tasks
        assert len(new) == 2 and all(os.sched_getaffinity(int(task.name)) == {core} for task in new)
    assert os.sched_getaffinity(0) == before, "the caller is where it was"
    assert asked.count((0, frozenset({core}))) == 3, "and was with them meanwhile"


def test_cores_that_are_not_there():
    with pytest.raises(OptionError, match=r"cores=\[4095\]: "):
        CpuBackend(cores=[4095])
    if hasattr(os, "sched_setaffinity"):
        with CpuBackend(cores=[min(os.sched_getaffinity(0))]).team as team:
            assert team.n_threads == 1
