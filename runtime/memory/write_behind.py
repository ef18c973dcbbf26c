"""Writing behind: what is to be written to disk waits in a queue of so many bytes for a thread."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator

from runtime.backends import forks

MOST = 128 << 20  # bytes that wait
_IDLE = 1.0  # seconds after which the thread ends; the next job starts another
_NICE = 10  # how far behind the threads that compute its own stands
_LAST = 10.0  # seconds that the end of the process waits for what is queued

_alive: weakref.WeakSet[WriteBehind] = weakref.WeakSet()


class WriteBehind:
    """Does jobs in their order, in a thread of its own, one at a time; none while `waits`."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._jobs = deque[tuple[int, Callable[[], None]]]()
        self.queued = 0  # bytes that jobs hold, the one under way included
        self._turn = threading.Condition()
        self._thread: threading.Thread | None = None
        self._readers = 0
        _alive.add(self)
        forks.forgets(self)

    def forget(self) -> None:
        """In a forked child: the thread is not here, and what was queued is the parent's."""
        self._jobs, self.queued, self._readers = deque(), 0, 0
        self._turn, self._thread = threading.Condition(), None

    def put(self, nbytes: int, job: Callable[[], None]) -> bool:
        """Have a job done that holds so many bytes; False: too many wait already."""
        with self._turn:
            if self._jobs and self.queued + nbytes > self._most:
                return False
            self._jobs.append((nbytes, job))
            self.queued += nbytes
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True, name="write behind")
                self._thread.start()
            self._turn.notify_all()
            return True

    def drain(self, seconds: float | None = None) -> bool:
        """Wait until all is done that was put before, at most so long; whether it is."""
        limit = None if seconds is None else time.monotonic() + seconds
        with self._turn:
            while self.queued or self._jobs:
                left = None if limit is None else limit - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._turn.wait(left)
        return True

    @contextlib.contextmanager
    def waits(self) -> Iterator[None]:
        """No job begins meanwhile: somebody reads, who is waited for."""
        with self._turn:
            self._readers += 1
        try:
            yield
        finally:
            with self._turn:
                self._readers -= 1
                self._turn.notify_all()

    def _work(self) -> None:
        _step_back()
        while (taken := self._next()) is not None:
            nbytes, job = taken
            try:
                job()
            except Exception as error:  # of one job: the others are still to be done
                print(f"runtime: writing behind: {error!r}", file=sys.stderr)
            finally:
                del job, taken  # what it held is free before it no longer counts
                with self._turn:
                    self.queued -= nbytes
                    self._turn.notify_all()

    def _next(self) -> tuple[int, Callable[[], None]] | None:
        """The next job; None, and another thread takes the ones to come: there was none."""
        with self._turn:
            self._turn.wait_for(lambda: self._jobs, _IDLE)
            while self._readers:
                self._turn.wait()
            if self._jobs:
                return self._jobs.popleft()
            self._thread = None
            return None


def _step_back() -> None:
    """Let threads that compute go first, where a thread can have a place of its own."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


@atexit.register
def _drain_all() -> None:
    for each in list(_alive):
        each.drain(_LAST)
