"""Writing behind: what is to be written to disk is done by a thread, behind those that compute."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable

from runtime.backends import forks

MOST = 64  # jobs that wait
_IDLE = 1.0  # seconds after which the thread ends; the next job starts another
_NICE = 10  # how far behind the threads that compute its own stands
_LAST = 20.0  # seconds that the end of the process waits for what is to be written

_alive: weakref.WeakSet[WriteBehind] = weakref.WeakSet()


class WriteBehind:
    """Does jobs in their order, in a thread of its own. Of too many the oldest are not done."""

    def __init__(self) -> None:
        self._jobs = deque[Callable[[], None]](maxlen=MOST)
        self._busy = False
        self._turn = threading.Condition()
        self._thread: threading.Thread | None = None
        _alive.add(self)
        forks.forgets(self)

    def forget(self) -> None:
        """In a forked child: the thread is not here, and what is to be done is the parent's."""
        self._jobs.clear()
        self._turn, self._thread, self._busy = threading.Condition(), None, False

    def put(self, job: Callable[[], None]) -> None:
        """Have a job done."""
        with self._turn:
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True, name="write behind")
                self._thread.start()
            self._turn.notify_all()

    def drain(self, seconds: float | None = None) -> bool:
        """Wait until all is done that was put before, at most so long; whether it is."""
        with self._turn:
            return self._turn.wait_for(lambda: not (self._jobs or self._busy), seconds)

    def _work(self) -> None:
        _step_back()
        while (job := self._next()) is not None:
            try:
                job()
            except Exception as error:  # of one job: the others are still to be done
                print(f"runtime: writing behind: {error!r}", file=sys.stderr)
            finally:
                del job
                with self._turn:
                    self._busy = False
                    self._turn.notify_all()

    def _next(self) -> Callable[[], None] | None:
        """The next job; None, and another thread takes the ones to come: there was none."""
        with self._turn:
            self._turn.wait_for(lambda: self._jobs, _IDLE)
            if self._jobs:
                self._busy = True
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
    end = time.monotonic() + _LAST
    for each in list(_alive):
        each.drain(max(0.0, end - time.monotonic()))
