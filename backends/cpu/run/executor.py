"""Threads that run plans: started once, woken natively, ended before their code is freed.

The work is in kernels/executor.py. Here are the control block it reads, the functions of the
operating system that it calls by address, and the lives of the threads.
"""

from __future__ import annotations

import _thread
import atexit
import ctypes
import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from runtime.backends import forks
from runtime.backends.cpu.abi import CONTROL
from runtime.backends.cpu.compile.objects import function
from runtime.backends.cpu.run.control import ABORT
from runtime.ops.errors import BackendError

_SPIN_NS = 200_000  # a worker waits this long for the next plan before it parks
_SPINS = 500  # turns in a barrier before a thread gives its processor away
_LINE = 64
_HEAR, _AGAIN = 0.05, 0.001  # seconds between two looks at signals, and at the end of an abort

_teams: weakref.WeakSet[ThreadTeam] = weakref.WeakSet()


class ThreadTeam:
    """`n_threads` threads, the caller's among them, that run one plan at a time together.

    loader: gives the address of a compiled kernel for its name and constants; like the threads'
    start it waits for the first plan. Use as a context manager, or `close()` it.
    """

    def __init__(self, n_threads: int, loader: Callable[[str, dict[str, Any]], int]) -> None:
        if n_threads < 1:
            raise ValueError(f"a team needs at least one thread, not {n_threads}")
        self.n_threads = n_threads
        self._loader = loader
        self._entry: Any = None  # the executor, once it is needed
        self._lock = forks.lock()
        self._control: np.ndarray | None = None
        self._end: weakref.finalize | None = None
        self._last: LongRun | None = None
        _teams.add(self)

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
            if self._control is None:
                self._start()
            assert self._control is not None, "started"
            self._end_last()
            words = {"table": table, "n_rows": n_rows, "profile": profile}
            if long and threading.current_thread() is threading.main_thread():
                self._last = run = LongRun(self._entry, self._control, self.n_threads, words)
                run.run()
                self._last = None
            else:
                _lead(self._entry, self._control, self.n_threads, **words)

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
            self._entry = function(self._loader("executor", {}))
        control = _control_block(self.n_threads)
        threads = [
            threading.Thread(
                target=_follow, args=(self._entry, control, number, self.n_threads),
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
                f"thread {started + 2} of {self.n_threads} cannot be started ({error}): load the "
                f"model with threads={started + 1} or fewer, or raise the system's limit "
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
        self, entry: Any, control: np.ndarray, n_threads: int, words: dict[str, int]
    ) -> None:
        self._control = control
        self._arguments, self._words = (entry, control, n_threads), words
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
                self._control[ABORT] = 1  # again, for the plan may only now have begun

    def _claimed_by(self, who: str) -> bool:
        return self._claim.setdefault("by", who) == who

    def _lead(self) -> None:
        try:
            if self._claimed_by("leader"):
                entry, control, n_threads = self._arguments
                _lead(entry, control, n_threads, **self._words)
        finally:
            self._ended = True
            self._running.release()


def _lead(entry: Any, control: np.ndarray, n_threads: int, **words: int) -> None:
    for name, value in words.items():
        control[CONTROL[name]] = value
    entry(control.ctypes.data, 0, n_threads)


def _follow(entry: Any, control: np.ndarray, number: int, n_threads: int) -> None:
    # The block lives as long as a thread reads it: its arguments hold it.
    entry(control.ctypes.data, number, n_threads)


def _end(entry: Any, control: np.ndarray, threads: list[threading.Thread], process: int) -> None:
    if process != os.getpid():
        return  # a fork copies no threads, and whatever state their locks were in
    _lead(entry, control, len(threads) + 1, table=0, n_rows=0, profile=0, stop=1)
    for thread in threads:
        if thread.ident is not None:
            thread.join()


def _control_block(n_threads: int) -> np.ndarray:
    """A zeroed control block on a cache line's boundary, with the system's functions filled in."""
    n_words = CONTROL["threads"] + 8 * n_threads
    room = np.zeros(n_words + 8, np.int64)
    control = room[-room.ctypes.data % _LINE // 8 :][:n_words]
    words = _windows() if sys.platform == "win32" else _posix(control)
    # With more threads than processors, whoever waits is in the way of whoever works.
    spins = _SPINS if n_threads <= _processors() else 16
    words |= {"self": control.ctypes.data, "spin_ns": _SPIN_NS, "spins": spins}
    for name, value in words.items():
        control[CONTROL[name]] = value
    return control


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _address(symbol: Any) -> int:
    return ctypes.cast(symbol, ctypes.c_void_p).value or 0


def _posix(control: np.ndarray) -> dict[str, int]:
    import time

    libc = ctypes.CDLL(None)
    names = ("mutex", "condition", "seconds")
    at = {name: control.ctypes.data + 8 * CONTROL[name] for name in names}
    libc.pthread_mutex_init(ctypes.c_void_p(at["mutex"]), None)
    libc.pthread_cond_init(ctypes.c_void_p(at["condition"]), None)
    return {
        "yield": _address(libc.sched_yield),
        "sleep": _address(libc.nanosleep),
        "sleep_for": at["seconds"],
        "nanoseconds": 20_000,
        "lock": _address(libc.pthread_mutex_lock),
        "unlock": _address(libc.pthread_mutex_unlock),
        "wait": _address(libc.pthread_cond_wait),
        "broadcast": _address(libc.pthread_cond_broadcast),
        "clock": _address(libc.clock_gettime),
        "clock_id": time.CLOCK_MONOTONIC,
        "clock_high": 1_000_000_000,
        "clock_low": 1,
    }


def _windows() -> dict[str, int]:
    # An SRWLOCK and a CONDITION_VARIABLE of zeros are initialised.
    kernel = ctypes.CDLL("kernel32")
    frequency = ctypes.c_int64()
    kernel.QueryPerformanceFrequency(ctypes.byref(frequency))
    return {
        "yield": _address(kernel.SwitchToThread),
        "sleep": _address(kernel.Sleep),
        "sleep_for": 1,  # millisecond
        "lock": _address(kernel.AcquireSRWLockExclusive),
        "unlock": _address(kernel.ReleaseSRWLockExclusive),
        "wait": _address(kernel.SleepConditionVariableSRW),
        "broadcast": _address(kernel.WakeAllConditionVariable),
        "clock": _address(kernel.QueryPerformanceCounter),
        "clock_id": -1,
        "clock_high": 1_000_000_000 // frequency.value,
        "clock_low": 0,
    }


@atexit.register
def _close_all() -> None:
    for team in list(_teams):
        team.close()


def _after_fork() -> None:
    # A fork copies no threads: none must be waited for.
    for team in list(_teams):
        team.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
