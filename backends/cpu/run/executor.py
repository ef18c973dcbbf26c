"""Threads that run plans: started once, woken natively, ended before their code is freed.

The work is in kernels/executor.py, and its control block in block.py.
"""

from __future__ import annotations

import _thread
import atexit
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from runtime.backends import forks
from runtime.backends.cpu.abi import CONTROL
from runtime.backends.cpu.compile.objects import function
from runtime.backends.cpu.run.block import control_block
from runtime.backends.cpu.run.control import ABORT
from runtime.backends.cpu.run.cores import Cores, pinned
from runtime.backends.plan.kernel import Kernel
from runtime.ops.errors import BackendError

_HEAR, _AGAIN = 0.05, 0.001  # seconds between two looks at signals, and at the end of an abort

_teams: weakref.WeakSet[ThreadTeam] = weakref.WeakSet()


class ThreadTeam:
    """`n_threads` threads, the caller's among them, that run one plan at a time together.

    loader: gives the address of a compiled kernel; like the threads' start it waits for the first
    plan. cores: logical processors that the threads keep to, the caller's while it runs a plan;
    None: any. Use as a context manager, or `close()` it.
    """

    def __init__(
        self, n_threads: int, loader: Callable[[Kernel], int], cores: Cores | None = None
    ) -> None:
        if n_threads < 1:
            raise ValueError(f"a team needs at least one thread, not {n_threads}")
        self.n_threads, self.loader = n_threads, loader
        self.cores = [cores] * n_threads  # of each thread
        self._entry: Any = None  # the executor, once it is needed
        self._lock = forks.lock()
        self._control: np.ndarray | None = None
        self._end: weakref.finalize | None = None
        self._last: LongRun | None = None
        _teams.add(self)
        forks.forgets(self)

    def run(self, table: int, n_rows: int, profile: int = 0, long: bool = False) -> None:
        """Run the plan of `n_rows` rows at address `table`; returns when all threads are done.

        profile: address of n_rows + 1 int64 that receive nanoseconds at the start of each row
        (after its barrier) and at the end, or 0. long: it may take so long that who presses
        Ctrl-C waits for the end; then KeyboardInterrupt comes after the row under way, and what
        the plan writes is worth nothing.
        BackendError: the system lets no more threads start; a later call tries again.
        """
        if n_rows == 0:
            return
        with self._lock:
            self.run_with((), table, n_rows, profile, long)

    def run_with(
        self, led: Sequence[ThreadTeam], table: int, n_rows: int, profile: int, long: bool,
        meeting: Sequence[np.ndarray] = (),
    ) -> None:  # fmt: skip
        """As `run`, for who holds the locks: a plan that leads other teams, and lets them meet."""
        control = self.ready()
        words = {"table": table, "n_rows": n_rows, "profile": profile}
        plan = self._entry, control, self.n_threads, words, self.cores[0]
        if long and threading.current_thread() is threading.main_thread():
            run = LongRun(*plan)
            run.aborted += [*(team.ready() for team in led), *meeting]
            self._note(led, run)
            run.run()
            self._note(led, None)
        else:
            _lead(*plan)

    def ready(self) -> np.ndarray:
        """The control block of threads that wait for a plan; for who holds the lock."""
        if self._control is None:
            self._start()
        assert self._control is not None, "started"
        self._end_last()
        return self._control

    def _note(self, led: Sequence[ThreadTeam], run: LongRun | None) -> None:
        """Who interrupts a run twice leaves it under way; the next plan of any of them ends it."""
        for team in (self, *led):
            team._last = run

    def abort(self) -> None:
        """End the plan that another thread runs after the row under way, if there is one."""
        control = self._control
        if control is not None:
            control[ABORT] = 1

    def close(self) -> None:
        """End the threads. The next `run` starts new ones; a team nobody holds ends by itself."""
        with self._lock:
            self._end_last()
            end = self._end
            self.forget()  # before they end: a team without its threads would wait for ever
            if end is not None:
                end()

    def forget(self) -> None:
        """Begin anew with the next `run`, whatever has become of the threads."""
        self._control = self._end = self._last = None

    def _end_last(self) -> None:
        """A run that was interrupted twice, so that not even its early end was waited for."""
        if self._last is not None:
            self._last.abort()
            self._last = None

    def __enter__(self) -> ThreadTeam:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        if self._entry is None:
            self._entry = function(self.loader(Kernel.of("executor")))
        control = control_block(self.n_threads)
        threads = [
            threading.Thread(
                target=_follow,
                args=(self._entry, control, number, self.n_threads, self.cores[number]),
                name=f"runtime-cpu-{number}", daemon=True,
            )
            for number in range(1, self.n_threads)
        ]  # fmt: skip
        ends = self._entry, control, threads, os.getpid()
        try:
            for thread in threads:
                thread.start()
        except RuntimeError as error:
            _end(*ends)
            started = sum(thread.ident is not None for thread in threads)
            raise BackendError(
                f"thread {started + 2} of {self.n_threads} cannot be started ({error}): give "
                f"threads={started + 1} (-t) or fewer, or raise the system's limit "
                "(`ulimit -u`; memory; in a container its number of processes)"
            ) from None
        except BaseException:
            _end(*ends)
            raise
        self._end = weakref.finalize(self, _end, *ends)
        self._control = control


class LongRun:
    """A plan run from a thread of its own, while this one waits and hears of signals.

    Python runs the handlers of signals in the main thread, between two of its own instructions:
    not while that is inside of the plan.
    """

    def __init__(
        self, entry: Any, control: np.ndarray, n_threads: int, words: dict[str, int],
        cores: Cores | None = None,
    ) -> None:  # fmt: skip
        self.aborted = [control]  # the blocks of all that end with it
        self._plan = entry, control, n_threads, words, cores
        # An interrupt may come between any two lines, so nothing here counts on a line being
        # reached: whoever claims the run first has it, and asking again changes nothing.
        self._claim: dict[str, str] = {}
        self._ended, self._running = False, threading.Lock()
        self._running.acquire()

    def run(self) -> None:
        """Run it; what a signal's handler raises ends it early."""
        try:
            try:
                _thread.start_new_thread(self._lead, ())
            except RuntimeError:  # no more threads, so no signals meanwhile
                self._lead()
            self.wait()
        except BaseException:
            self.abort()
            raise

    def wait(self) -> None:
        """Until it has ended, or a signal's handler raises. Windows hears of signals in between."""
        while not self._ended:
            self._running.acquire(timeout=_HEAR)

    def abort(self) -> None:
        """End it after the row under way, and wait for that."""
        if self._claimed_by("nobody"):
            return  # it has not begun, and will not
        while not self._ended:
            if not self._running.acquire(timeout=_AGAIN):
                for control in self.aborted:
                    control[ABORT] = 1  # again, for the plan may only now have begun

    def _claimed_by(self, who: str) -> bool:
        return self._claim.setdefault("by", who) == who

    def _lead(self) -> None:
        try:
            if self._claimed_by("leader"):
                _lead(*self._plan)
        finally:
            self._ended = True
            self._running.release()


def _lead(
    entry: Any, control: np.ndarray, n_threads: int, words: dict[str, int], cores: Cores | None
) -> None:
    for name, value in words.items():
        control[CONTROL[name]] = value
    if cores is None:
        entry(control.ctypes.data, 0, n_threads)
    else:
        with pinned(cores):
            entry(control.ctypes.data, 0, n_threads)


def _follow(
    entry: Any, control: np.ndarray, number: int, n_threads: int, cores: Cores | None
) -> None:
    # The block lives as long as a thread reads it: its arguments hold it.
    with pinned(cores):
        entry(control.ctypes.data, number, n_threads)


def _end(entry: Any, control: np.ndarray, threads: list[threading.Thread], process: int) -> None:
    if process != os.getpid():
        return  # a fork copies no threads, and whatever state their locks were in
    words = {"table": 0, "n_rows": 0, "profile": 0, "stop": 1}
    _lead(entry, control, len(threads) + 1, words, None)
    for thread in threads:
        if thread.ident is not None:
            thread.join()


@atexit.register
def _close_all() -> None:
    for team in list(_teams):
        team.close()
