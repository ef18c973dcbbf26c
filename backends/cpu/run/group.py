"""Several teams of threads that run their own plans at the same time, led by one call.

The teams' threads 0 are a team as well, the caller among them: its plan is one row, by which each
leads its own team (see kernels/executor.py). So no Python runs between the start and the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np

from runtime.backends.cpu.abi import CONTROL
from runtime.backends.cpu.run.block import control_block
from runtime.backends.cpu.run.control import ABORT, MEMBERS
from runtime.backends.cpu.run.executor import ThreadTeam
from runtime.backends.cpu.run.table import Table
from runtime.backends.plan.kernel import Kernel


class TeamGroup:
    """Teams that run one plan each together; each can still run plans alone in between.

    Use as a context manager, or `close()` it; the teams are their owner's to close.
    """

    def __init__(self, teams: Sequence[ThreadTeam]) -> None:
        self._teams = tuple(teams)
        self.n_threads = sum(team.n_threads for team in teams)
        self._heads = ThreadTeam(len(teams), teams[0].loader)
        self._heads.cores = [team.cores[0] for team in teams]
        self.meeting = control_block(self.n_threads)  # where calls of the plans meet all threads
        self.meeting[MEMBERS] = self.n_threads
        self._jobs = np.zeros((len(teams), 5), np.int64)
        self._table: Table | None = None

    def run(self, tables: Sequence[tuple[int, int]], long: bool = False, profile: int = 0) -> None:
        """Run the plan (address of its records, their number) of each team; returns when all end.

        The plans meet the same number of times. long, profile (of the first team's plan): see
        `ThreadTeam.run`. BackendError: the system lets no more threads start.
        """
        with contextlib.ExitStack() as held:
            for team in (*self._teams, self._heads):
                held.enter_context(team._lock)
            for job, team, table in zip(self._jobs, self._teams, tables, strict=True):
                control = team.ready()
                # with more threads than processors, whoever waits is in the way of whoever works
                control[CONTROL["spins"]] = self.meeting[CONTROL["spins"]]
                job[:] = control.ctypes.data, *table, team.n_threads, 0
            self._jobs[0, 4] = profile
            self.meeting[[CONTROL["arrivals"], ABORT]] = 0
            plan = self._plan().records()
            self._heads.run_with(self._teams, *plan, 0, long, [self.meeting])

    def abort(self) -> None:
        """End the plans that another thread runs after the rows under way, if there are any."""
        self.meeting[ABORT] = 1
        for team in (*self._teams, self._heads):
            team.abort()

    def close(self) -> None:
        """End the threads that lead."""
        self._heads.close()

    def __enter__(self) -> TeamGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _plan(self) -> Table:
        if self._table is None:
            address = self._heads.loader(Kernel.of("lead_teams"))
            self._table = Table.single(address, [self._jobs.ctypes.data])
        return self._table
