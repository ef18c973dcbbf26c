"""Steps on their way through stages, several at a time: each stage has a thread of its own."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np

from runtime.backends import forks
from runtime.ops.errors import BackendError

_HEAR, _AGAIN = 0.05, 0.001  # seconds between two looks at signals, and at the end of an abort


class Step:
    """What each stage does for one step, in order, and what gives its `results` then.

    An interrupt may come between any two lines of who waits for it, so nothing there counts on a
    line being reached: a stage is done by who claims it first, its thread or nobody.
    """

    def __init__(
        self, stages: Sequence[Callable[[], None]], results: Callable[[], Sequence[np.ndarray]]
    ) -> None:
        self.results = results
        self.error: BaseException | None = None
        self._running = threading.Lock()
        self._running.acquire()
        self._stages, self._claims, self._through = stages, dict[int, str](), 0

    def go(self, number: int) -> bool:
        """Do a stage, in its thread; whether the step goes on to the next."""
        if self._claims.setdefault(number, "thread") != "thread":
            return False
        try:
            self._stages[number]()
        except BaseException as error:
            self.error = error
        self._through = number + 1
        if self.error is None and self._through < len(self._stages):
            return True
        self._running.release()
        return False

    def wait(self) -> None:
        """Until it has ended, or a signal's handler raises; once."""
        while not self._running.acquire(timeout=_HEAR):  # Windows hears of signals in between
            pass

    def stop(self) -> bool:
        """Let no further stage begin; whether none is under way."""
        begun = 0
        while begun < len(self._stages) and self._claims.setdefault(begun, "nobody") == "thread":
            begun += 1
        return self._through == begun


class Line:
    """The threads of some stages, started when they are first needed.

    abort: ends early what stages are doing. Use `close()`; a line nobody holds ends by itself.
    """

    def __init__(self, n_stages: int, abort: Callable[[], None]) -> None:
        self._n_stages, self._abort = n_stages, abort
        self._under_way: deque[Step] = deque()
        self._queues: list[SimpleQueue[Step | None]] | None = None
        self._end: weakref.finalize[Any, Any] | None = None
        forks.forgets(self)

    def through(self, steps: Iterable[Step]) -> Iterator[Step]:
        """These steps in order, each when it has ended; as many more as there are stages are asked
        for before. A step's error is raised.
        """
        self.settle()
        queues = self._queues or self._start()
        try:
            for step in steps:
                self._under_way.append(step)
                queues[0].put(step)
                if len(self._under_way) > self._n_stages:
                    yield self._ended()
            while self._under_way:
                yield self._ended()
        finally:
            self.settle()

    def settle(self) -> None:
        """Whatever is under way goes no further, and what its stages are doing ends early.

        For who uses their memory otherwise: steps are left behind by who is interrupted twice.
        """
        for step in list(self._under_way):
            step.stop()
        while self._under_way:
            while not self._under_way[0].stop():
                self._abort()
                time.sleep(_AGAIN)
            self._under_way.popleft()

    def close(self) -> None:
        """End the threads; the next step starts new ones."""
        self.settle()
        end = self._end
        self.forget()
        if end is not None:
            end()

    def forget(self) -> None:
        """Begin anew with the next step, whatever has become of the threads."""
        self._queues = self._end = None
        self._under_way.clear()

    def _ended(self) -> Step:
        if not self._under_way:
            raise BackendError("this process was forked in the middle of a step: do it again")
        step = self._under_way[0]
        step.wait()
        self._under_way.popleft()
        error, step.error = step.error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # or it and what it remembers of its way would hold one another
        return step

    def _start(self) -> list[SimpleQueue[Step | None]]:
        queues: list[SimpleQueue[Step | None]] = [SimpleQueue() for _ in range(self._n_stages)]
        threads = [
            threading.Thread(
                target=_work, args=(number, queues), name=f"runtime-stage-{number}", daemon=True
            )
            for number in range(self._n_stages)
        ]
        if self._end is not None:
            self._end()  # a start that was interrupted
        self._end = weakref.finalize(self, _end, queues, threads, os.getpid())
        try:
            for thread in threads:
                thread.start()
        except RuntimeError as error:
            raise BackendError(
                f"a thread for each of {self._n_stages} stages cannot be started ({error}): "
                "raise the system's limit (`ulimit -u`; in a container its number of processes)"
            ) from None
        self._queues = queues
        return queues


def _work(number: int, queues: list[SimpleQueue[Step | None]]) -> None:
    """The thread of a stage: steps as they come, until there is None."""
    while (step := queues[number].get()) is not None:
        if step.go(number):
            queues[number + 1].put(step)
        del step  # while it waits for the next it would hold this one


def _end(
    queues: list[SimpleQueue[Step | None]], threads: list[threading.Thread], process: int
) -> None:
    if process != os.getpid():
        return  # a fork copies no threads
    for queue in queues:
        queue.put(None)
    for thread in threads:
        if thread.ident is not None and thread is not threading.current_thread():
            thread.join()
