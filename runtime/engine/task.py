"""Task: tokens on their way through the steps of a model, and who waits for what they give."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.engine.advance import Piece
from runtime.engine.decoder import Next
from runtime.engine.sequence import Sequence
from runtime.errors import Error

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future

    from runtime.engine.engine import Engine

OnPrompt = Callable[[int, int], Any]  # tokens evaluated, tokens to evaluate

_FAR = float("inf")


class Task:
    """What goes on by steps: whoever makes one says what is evaluated next and takes the rows.

    `sequence` is where its tokens are, None while it waits for memory, and `length` how many those
    are as far as it knows. `pending` comes next: the tokens of a prompt, or one. `read` of `total`
    are done of a prompt. `over`: nothing more is wanted; `error`: because it cannot go on.
    `asked`: the next token is wanted, by somebody who reads.
    Of those that are submitted `rank`: who goes first, the least. `deadline`: when it ends at the
    latest, as `time.monotonic` counts. `droppable`: its memory may go to others for a while.
    """

    __slots__ = (
        "__weakref__", "asked", "deadline", "droppable", "ending", "error", "length", "on_prompt",
        "over", "pending", "rank", "read", "said", "sequence", "total", "waiting",
    )  # fmt: skip

    def __init__(
        self, sequence: Sequence | None, pending: list[int], on_prompt: OnPrompt | None = None
    ) -> None:
        self.sequence, self.pending, self.on_prompt = sequence, pending, on_prompt
        self.length = 0 if sequence is None else sequence.record.length
        self.read, self.total, self.said = 0, len(pending), -1
        self.over = self.asked = self.droppable = False
        self.error: Exception | None = None
        self.rank, self.deadline = 0.0, _FAR
        # locks to release, and (loop, future) of event loops: when anything is new, at the end
        self.waiting, self.ending = deque[Any](), deque[Any]()

    def known(self) -> np.ndarray | None:
        """The logits after what is pending where no step is needed: it was a draft."""
        return None

    def next(self) -> Next | None:
        """What is pending, where a device can choose what follows; None: it cannot."""
        return None

    def piece(self, answers: int, alone: bool) -> Piece:
        """A single token that is pending, for a step of so many answers, with drafts behind it
        where it likes; alone: without."""
        assert self.sequence is not None, "who is in a step has memory"
        return Piece(self.sequence, self.pending)

    def row(self, piece: Piece, found: np.ndarray | Error) -> np.ndarray | Error | None:
        """Of what a step found for a piece the logits after what is pending, or an error.

        None: it has to be evaluated alone.
        """
        return found if isinstance(found, Error) else found[-1]

    def take(self, found: np.ndarray | int) -> None:
        """The logits after what was pending, float32 [vocabulary], valid during the call; or the
        token that a device chose. Sets `pending`, or `over`."""
        raise NotImplementedError

    def start(self, engine: Engine) -> None:
        """It gets memory: `sequence`, and `pending` behind what that has."""
        raise NotImplementedError

    def told(self) -> None:
        """Those who want to hear of what it has taken are told, before the next step."""

    def ended(self) -> None:
        """It is over, and gives back what it has."""

    def late(self) -> None:
        """Its deadline has come."""
        self.over = True

    def moved(self) -> Exception:
        """What to say where somebody else has changed its sequence."""
        raise NotImplementedError

    def fail(self, error: Exception) -> None:
        """It cannot go on."""
        self.error, self.over, self.asked = error, True, False

    def dropped(self) -> None:
        """Its memory goes to others: all its tokens are to be evaluated again."""
        assert self.sequence is not None, "only who has memory can lose it"
        record = self.sequence.record
        self.pending = record.tokens[: record.length] + self.pending
        self.read, self.total, self.length = 0, len(self.pending), 0
        self.sequence = None

    def say(self) -> None:
        """Tell who wants to know how far its prompt is."""
        if self.on_prompt is not None and self.said != self.read:
            self.said = self.read
            self.on_prompt(self.read, self.total)

    def wait(self, ready: Callable[[], bool], timeout: float = -1, end: bool = False) -> bool:
        """Until something is new of it, or it ends, and `ready` says so; False after seconds."""
        while not ready():
            lock = threading.Lock()
            lock.acquire()
            (self.ending if end else self.waiting).append(lock)
            if not ready() and not lock.acquire(timeout=timeout):
                return ready()
        return True


def wake(tasks: Iterable[Task]) -> None:
    """Something is new of these: whoever waits for one looks again; a call for each event loop."""
    loops: dict[AbstractEventLoop, list[Future[None]]] = {}
    for task in tasks:
        if task.waiting:
            _wake(task.waiting, loops)
        if task.over and task.ending:
            _wake(task.ending, loops)
    for loop, futures in loops.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(_set, futures)


def _wake(waiting: deque[Any], loops: dict[AbstractEventLoop, list[Future[None]]]) -> None:
    while waiting:
        try:
            waiter = waiting.popleft()
        except IndexError:  # another thread was quicker
            return
        if isinstance(waiter, tuple):
            loops.setdefault(waiter[0], []).append(waiter[1])
        else:
            waiter.release()


def _set(futures: list[Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
