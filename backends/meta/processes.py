"""The processes of an MPI run: what they tell each other, and how they wait for each other.

Whoever waits looks again and again, giving its processor away in between, and after a while naps:
so it hears when another process has ended, and leaves processors to those that work, which an MPI
library that waits by itself does not.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends.meta.messages import packed, unpacked
from runtime.ops.errors import BackendError, OptionError

_SPIN, _SHORT_NAP, _NAP, _LONG_NAP, _LEAVE = 0.02, 0.00005, 0.0002, 0.005, 0.1  # seconds
_TOLD, _ANSWERED, _FAILED, _EXCHANGED = 1, 2, 3, 4  # tags
_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS")
_RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID")
_yield: Callable[[], None] = getattr(os, "sched_yield", lambda: time.sleep(0))


def launched() -> bool:
    """Whether an MPI launcher may have started this process; without asking MPI."""
    return any(name in os.environ for name in _RANKS)


def follows() -> bool:
    """Whether a launcher started it beside a first one."""
    return next((os.environ[name] for name in _RANKS if name in os.environ), "0") != "0"


@cache
def processes() -> Processes:
    """Those of this run. OptionError: MPI is not there, or there is one process."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise OptionError(
            f"devices: mpi needs mpi4py and an MPI library ({why}): "
            "pip install 'graph-runtime[mpi]'"
        ) from None
    if MPI.COMM_WORLD.size == 1:
        started = next((os.environ[name] for name in _SIZES if name in os.environ), "1")
        if started not in ("0", "1"):
            library = MPI.Get_library_version().split("\n")[0].strip(" \0")
            raise OptionError(
                f"devices: this is one of {started} processes, of which its MPI library knows "
                f"nothing: start them with the mpiexec of that library ({library})"
            )
        raise OptionError(
            "devices: mpi is for several processes; start them with "
            "mpiexec -n 2 runtime run MODEL --devices 'tensor(mpi)'"
        )
    return Processes(MPI)


class Processes:
    """rank: the number of this one, of `size`. beside: how many of them are on this machine."""

    def __init__(self, mpi: Any) -> None:
        self._mpi, self._comm = mpi, mpi.COMM_WORLD.Dup()
        self.rank, self.size = self._comm.rank, self._comm.size
        self.beside = self._comm.Split_type(mpi.COMM_TYPE_SHARED).size
        _bear_notice()
        self.lost, self.status = "", 1  # why this run cannot go on; what it then exits with
        self.crowded = False  # whoever waits is in the way of whoever works
        self.stop = False  # of the first process: it wishes the step under way to end early
        own = _machine(), os.getpid()
        self._watched = {}  # open files that can be read once a process has ended
        for rank, (machine, pid) in enumerate(self._comm.allgather(own)):
            if machine and machine == own[0] and rank != self.rank:
                with contextlib.suppress(OSError):  # it has ended already
                    self._watched[os.pidfd_open(pid)] = rank

    def tell(self, message: Sequence[Any]) -> None:
        """Say something to all others, which `hear` it."""
        self.check()
        content = np.frombuffer(packed(message), np.uint8)
        self._wait([self._send(content, rank, _TOLD) for rank in self._others()])

    def hear(self) -> list[Any]:
        """What the first process says next."""
        return unpacked(self._received(0, _TOLD))

    def answer(self, result: Any, error: str = "") -> None:
        """Give the first process what it waits for with `answers`."""
        content = np.frombuffer(packed([result, error]), np.uint8)
        self._wait([self._send(content, 0, _ANSWERED)])

    def answers(self) -> list[list[Any]]:
        """[result, error] of all others, in order."""
        return [unpacked(self._received(rank, _ANSWERED)) for rank in self._others()]

    def fail(self, error: str) -> None:
        """Let the first process know, wherever it is, that this one cannot go on."""
        self._wait([self._send(np.frombuffer(error.encode(), np.uint8), 0, _FAILED)])

    def exchange(
        self, mine: np.ndarray, counts: Sequence[int], found: np.ndarray, starts: Sequence[int]
    ) -> bool:
        """Give everybody `mine` and take what each has: counts[i] bytes of process i, at starts[i].

        False where the first process wishes the step to end, alike in all of them; that cannot be
        where it has nothing to give.
        """
        rooms = [found[at : at + n] for n, at in zip(counts, starts, strict=True)]
        stop = self.stop and counts[0] > 1
        given = mine[:1] if stop else mine
        requests = [
            self._comm.Irecv([rooms[r], self._mpi.BYTE], r, _EXCHANGED)
            for r in self._others() if counts[r]
        ]  # fmt: skip
        statuses = [self._mpi.Status() for _ in requests]
        if counts[self.rank]:
            requests += [self._send(given, r, _EXCHANGED) for r in self._others()]
            rooms[self.rank][:] = mine
            statuses += [self._mpi.Status() for _ in self._others()]
        self._wait(requests, statuses)
        if self.rank and counts[0] > 1:
            stop = statuses[0].Get_count(self._mpi.BYTE) == 1
        return not stop

    def check(self) -> None:
        """BackendError once this run cannot go on."""
        if self.lost:
            raise BackendError(self.lost)

    def lose(self, why: str) -> BackendError:
        """This run cannot go on: the error that says so."""
        self.lost = self.lost or why
        return BackendError(self.lost)

    def leave(self) -> None:
        """The first process has said why this run cannot go on: the others need not."""
        requests = [self._send(np.empty(0, np.uint8), rank, _FAILED) for rank in self._others()]
        until = time.monotonic() + _LEAVE
        while not self._mpi.Request.Testall(requests) and time.monotonic() < until:
            _yield()

    def speaks(self) -> bool:
        """Whether this is the first of the processes that are known to be there, and none spoke."""
        return set(range(self.rank)) <= set(self._ended()) and not self._comm.Iprobe(0, _FAILED)

    def _others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def _send(self, content: np.ndarray, rank: int, tag: int) -> Any:
        return self._comm.Isend([content, self._mpi.BYTE], rank, tag)

    def _received(self, rank: int, tag: int) -> bytes:
        status = self._mpi.Status()
        self._until(lambda: self._comm.Iprobe(rank, tag, status))
        content = np.empty(status.Get_count(self._mpi.BYTE), np.uint8)
        self._wait([self._comm.Irecv([content, self._mpi.BYTE], rank, tag)])
        return content.tobytes()

    def _wait(self, requests: list[Any], statuses: list[Any] | None = None) -> None:
        self._until(lambda: self._mpi.Request.Testall(requests, statuses))

    def _until(self, done: Callable[[], bool]) -> None:
        """Until it is so. BackendError: another process has ended, failed, or cannot be reached."""
        try:
            since = None
            while not done():
                now = time.monotonic()
                since = since or now
                if now - since < _SPIN:
                    time.sleep(_SHORT_NAP) if self.crowded else _yield()
                else:
                    self._nap(min(_LONG_NAP, max(_NAP, (now - since) / 50)))
        except self._mpi.Exception as error:
            raise self.lose(f"MPI: {error}") from None

    def _nap(self, seconds: float) -> None:
        ended = self._ended(seconds)
        if ended:
            raise self.lose(f"MPI process {ended[0]} has ended, and with it this run")
        status = self._mpi.Status()
        if self.rank == 0 and self._comm.Iprobe(self._mpi.ANY_SOURCE, _FAILED, status):
            rank = status.Get_source()
            why = self._received(rank, _FAILED).decode()
            raise self.lose(f"MPI process {rank}: {why}")

    def _ended(self, seconds: float = 0) -> list[int]:
        """Which are known to have ended, after so long or as soon as there is one."""
        if not self._watched:
            time.sleep(seconds)
            return []
        found, _, _ = select.select([*self._watched], [], [], seconds)
        return [self._watched[file] for file in found]


def _bear_notice() -> None:
    """MPICH tells of a dead process by a signal that would end this one without a word."""
    number = getattr(signal, "SIGUSR1", None)
    here = threading.current_thread() is threading.main_thread()
    if number is not None and here and signal.getsignal(number) is signal.SIG_DFL:
        signal.signal(number, signal.SIG_IGN)


def _machine() -> str:
    """What processes that can watch each other have in common; empty: none can."""
    if not hasattr(os, "pidfd_open"):
        return ""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii")
        return boot + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
