"""Scheduler: who takes part in the next step of a model.

Whoever reads an answer runs the steps for it. While requests are under way that nobody has to read
(`submit`), a thread does, for them and for all readers; it ends with the last of them. The main
thread, which Ctrl-C interrupts, never goes on with what is somebody else's.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from bisect import insort
from collections.abc import Sequence
from math import inf

from runtime.backends import forks
from runtime.engine.engine import Engine
from runtime.engine.rounds import Rounds
from runtime.engine.task import Task, wake
from runtime.errors import MemoryLimitError, OptionError
from runtime.ops import PAGE

_MOST = 256  # tasks that have memory at a time
_AHEAD = 2  # pages that a task has to be able to grow by when it is let in
_LOOK = 0.05  # seconds after which memory is looked at again, for those who wait for it
_GRACE = 1.0  # seconds that who reads answers has for what comes between two pieces
_NAP = 0.002  # seconds between two looks where nobody can go on but by what others give back
_LEAVE = 5.0  # seconds that the end of the interpreter waits for the step under way

_schedulers: weakref.WeakSet[Scheduler] = weakref.WeakSet()


class Scheduler:
    """Of one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._rounds = engine, Rounds(engine)
        self._turn = forks.lock()  # whoever has it runs a step
        self._list = forks.lock()  # whoever has it changes the two lists
        self._queue: list[Task] = []  # without memory, in order
        self._running: list[Task] = []
        self._asked: dict[Task, None] = {}
        self._leaving: dict[int, None] = {}  # threads that wait for the end of the step under way
        self._thread: threading.Thread | None = None
        self._sweep = self._closing = False
        self._why = ""  # nothing more can be submitted
        self._looked = 0.0  # when memory was last looked at
        self._soonest = inf  # deadline of any
        self._read_at = -inf  # when somebody last read a piece
        forks.forgets(self)
        _schedulers.add(self)

    def submit(self, task: Task) -> None:
        """It goes on by itself from now on, until it is over. MemoryLimitError: it never could."""
        needed, most = pages_of(task), self._engine.pools.pages.count
        if needed > most:
            raise MemoryLimitError(
                f"{len(task.pending)} tokens need {needed} pages of KV cache and the model has "
                f"{most} ({most * PAGE} tokens); shorten the prompt, or load the model with a "
                "larger `context`"
            )
        with self._list:
            self._engine.check_open()
            if self._why:
                raise OptionError(self._why)
            insort(self._queue, task, key=_rank)
            self._looked, self._soonest = 0.0, min(self._soonest, task.deadline)
            self.serve()

    def serve(self) -> None:
        """Let a thread go on with what is submitted, where none does."""
        with self._list:
            if self._serves() or self._closing or not (self._queue or self._running):
                return
            thread = threading.Thread(target=_served, args=(self,), daemon=True)
            thread.name = "runtime-scheduler"
            atexit.unregister(_at_exit)  # it has to come before those of what steps need, whose
            atexit.register(_at_exit)  # own were registered before now
            self._thread = thread
            try:
                thread.start()
            except RuntimeError as error:
                self._thread, tasks = None, [*self._queue, *self._running]
                for task in tasks:
                    task.fail(OptionError(f"the scheduler's thread cannot be started ({error})"))

    def waits(self) -> None:
        """Somebody is going to wait for what is submitted; OptionError for whom it never comes."""
        if self._steps():
            raise OptionError(
                "this is called from the thread that runs the steps, by an on_token or on_prompt; "
                "it cannot wait for this model: submit what is to be written, and wait elsewhere"
            )
        self.serve()

    def end(self, task: Task) -> None:
        """Somebody wants no more of it: it gives its memory back after the step under way."""
        task.over = self._sweep = True

    def advance(self, tasks: Sequence[Task]) -> None:
        """Of these at least one goes on by a token or ends; all that share its steps do.

        OptionError from a callback of a request that is submitted.
        """
        for task in tasks:
            task.asked = True
            self._asked[task] = None
        try:
            while all(task.asked for task in tasks):
                if self._serves():
                    self.waits()
                    self._wait_for(tasks)
                else:
                    with self._turn:
                        if not self._serves() and all(task.asked for task in tasks):
                            self._drive(tasks)
        finally:
            self._leave(tasks)

    def close(self, why: str) -> None:
        """All tasks end with an error."""
        with self._list:
            self._why = why
            tasks = [*self._queue, *self._running, *self._asked]
        for task in tasks:
            if not task.over:
                task.fail(OptionError(why))
        self._sweep = True
        thread = self._thread
        if thread not in (None, threading.current_thread()) and not self._steps():
            thread.join()

    def forget(self) -> None:
        """In a forked child: the thread is not there, and what it was about is not whole."""
        found = [*self._queue, *self._running]
        self._thread, self._queue, self._running, self._asked = None, [], [], {}
        self._leaving = {}
        for task in found:
            why = "the process was forked while this request was under way: submit it again here"
            task.fail(OptionError(why))
            if task.sequence is not None:
                task.sequence.close()

    def _steps(self) -> bool:
        """Whether nobody can go on before this very call returns: a step's thread makes it."""
        return bool(self._turn._is_owned() or self._engine.lock._is_owned())

    def _serves(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _wait_for(self, tasks: Sequence[Task]) -> None:
        """Until one of a reader's tasks has what it asked for, or nobody serves any more."""
        first = tasks[0]
        read = first.read
        for task in tasks:
            task.waiting = first.waiting
            task.say()
        first.wait(
            lambda: (
                not all(task.asked for task in tasks) or first.read != read or not self._serves()
            )
        )

    def _leave(self, tasks: Sequence[Task]) -> None:
        """A reader's tasks take part no more, once no step is under way with them."""
        broken = any(task.asked for task in tasks) and self._serves()
        self._read_at = time.monotonic()
        for task in tasks:
            task.asked = False
            self._asked.pop(task, None)
        if not broken:
            return
        try:
            self._leaving[threading.get_ident()] = None
            with self._turn:
                pass
        finally:
            self._leaving.pop(threading.get_ident(), None)

    def _drive(self, own: Sequence[Task]) -> None:
        """A step for a reader, and for others who read meanwhile."""
        mine = threading.get_ident() == threading.main_thread().ident
        tasks = [task for task in (own if mine else [*self._asked]) if task.asked]
        if len(tasks) == 1 and tasks[0].read < tasks[0].total:
            self._rounds.whole(tasks[0])
            return
        for task in own:
            task.say()
        for task, error in self._rounds.run(tasks):
            task.fail(error)
        for task in own:
            task.say()

    def _serve(self) -> bool:
        """A step for all; False once nothing is left that was submitted."""
        if self._leaving:  # a lock that is taken again at once is never theirs
            time.sleep(_NAP)
        with self._turn:
            now = time.monotonic()
            self._drop(now)
            asked = [task for task in [*self._asked] if task.asked]
            others = bool(asked) or now - self._read_at < _GRACE
            self._admit(now, others)
            running = [task for task in self._running if not task.over]
            if running or asked:
                for task, error in self._rounds.run([*running, *asked]):
                    self._short(task, error, others)
                for task in running:
                    task.told()
                    self._sweep |= task.over
                wake(running)
                wake(asked)
            self._drop(now)
        if not (running or asked):
            time.sleep(_NAP)
        with self._list:
            if self._queue or self._running:
                return True
            self._thread = None
        wake([*self._asked])
        return False

    def _broken(self, error: BaseException) -> None:
        """Nobody may wait for what does not come."""
        with self._list:
            tasks = [*self._queue, *self._running]
            self._thread, self._queue, self._running = None, [], []
        for task in tasks:
            task.fail(OptionError(f"the scheduler has ended: {error!r}"))
            if task.sequence is not None:
                task.sequence.close()
        wake([*tasks, *self._asked])

    def _drop(self, now: float) -> None:
        """Those that are over, or late, leave and give back what they have."""
        if now >= self._soonest:
            tasks = (*self._running, *self._queue)
            for task in tasks:
                if task.deadline <= now and not task.over:
                    task.late()
            self._soonest = min((t.deadline for t in tasks if not t.over), default=inf)
            self._sweep = True
        if not self._sweep:
            return
        self._sweep, self._looked = False, 0.0
        with self._list:
            gone = [task for task in (*self._running, *self._queue) if task.over]
            self._running = [task for task in self._running if not task.over]
            self._queue = [task for task in self._queue if not task.over]
        for task in gone:
            task.ended()
        wake(gone)

    def _admit(self, now: float, others: bool) -> None:
        """Those who wait get memory, in order, as far as it goes. others: who reads has some."""
        busy = others or bool(self._running)
        if not self._queue or (busy and now - self._looked < _LOOK):
            return
        self._looked = now
        pools = self._engine.pools
        available = pools.pages.available
        room = available - sum(_growth(task) for task in self._running)
        while self._queue and len(self._running) < _MOST:
            task = self._queue[0]
            needed = pages_of(task)
            room -= needed + _AHEAD
            if busy and (room < 0 or len(self._running) >= max(1, pools.slots.count or _MOST)):
                return
            if needed > available and not busy:
                task.fail(_held(task, needed, available, pools.pages.count))
            else:
                self._begin(task)
            with self._list:
                self._queue.remove(task)
                if task.over:
                    self._sweep = True
                insort(self._running, task, key=_rank)
            busy = True

    def _begin(self, task: Task) -> None:
        try:
            task.start(self._engine)
        except Exception as error:
            task.fail(error)

    def _short(self, task: Task, error: MemoryLimitError, others: bool) -> None:
        """No memory for the next of a task: who came last gives up its own."""
        last = next((t for t in reversed(self._running) if t.droppable and not t.over), None)
        if last is None or (last is task and len(self._running) == 1 and not others):
            task.fail(error)
        elif last.sequence is not None:
            with self._list:
                self._running.remove(last)
                last.dropped()
                insort(self._queue, last, key=_rank)


def _rank(task: Task) -> float:
    return task.rank


def pages_of(task: Task) -> int:
    """Pages that its tokens take, the first that is to be chosen included."""
    return -(-(task.length + len(task.pending) + 1) // PAGE)


def _growth(task: Task) -> int:
    """Pages that a task may soon take."""
    assert task.sequence is not None, "who runs has memory"
    return max(0, pages_of(task) - task.sequence.record.pages.used) + _AHEAD


def _held(task: Task, needed: int, available: int, count: int) -> MemoryLimitError:
    return MemoryLimitError(
        f"{len(task.pending)} tokens need {needed} pages of KV cache; {available} of {count} are "
        "not held by sessions and snapshots: close some, or load the model with a larger "
        "`sequences`"
    )


def _served(scheduler: Scheduler) -> None:
    """The thread of what is submitted."""
    try:
        while scheduler._serve():
            if scheduler._closing:
                return
    except BaseException as error:
        scheduler._broken(error)


def _at_exit() -> None:
    """No step may be under way when the threads that run it end."""
    for scheduler in list(_schedulers):
        scheduler._closing = True
        thread = scheduler._thread
        if thread is not None:
            thread.join(_LEAVE)
