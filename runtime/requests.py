"""Requests: answers that go on by themselves, many at a time, whether somebody reads or not."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from runtime.arguments import number
from runtime.asking import continuation, reply
from runtime.engine.engine import Engine
from runtime.errors import OptionError
from runtime.writing import Options, Prompt, Writing, Written

if TYPE_CHECKING:
    from runtime.model import Model
    from runtime.speculation.speculation import Drafts

_WORTH = 10.0  # seconds of waiting that a step of priority is worth


class Timings(NamedTuple):
    """Seconds that a request waited for memory, that its prompt took up to the first token, and
    that the others took; so far."""

    queued: float
    prompt: float
    decode: float


class Submitted(Writing):
    """An answer that is the scheduler's. `why`: that it was left before its end. `times`: when it
    was submitted, first had memory, had its first token, and was over; as far as it has come."""

    __slots__ = ("_drafts", "_model", "times", "why")

    def __init__(
        self, model: Model, prompt: Prompt, options: Options, priority: float, deadline: float
    ) -> None:
        super().__init__(model, prompt, options)
        now = time.monotonic()
        self._model, self.times, self.why = model, [now], ""
        self.rank, self.deadline = now - _WORTH * priority, now + deadline
        self.droppable = prompt.owned
        self._drafts: Drafts | None = None  # before its memory went to others

    def start(self, engine: Engine) -> None:
        """See Task."""
        if self.owned:
            self.session = self._model.session()
            self.sequence = self.session._sequence
            self.length = 0
        if self.begun:  # once more, after its memory went to others
            self._speculate(self._enter())
            if self.speculation is not None and self._drafts is not None:
                self.speculation.done = self._drafts
        else:
            self.begin()
            self._reach(1)

    @property
    def drafts(self) -> Drafts | None:
        """See Writing."""
        return self._drafts if self.speculation is None else super().drafts

    def dropped(self) -> None:
        """See Task."""
        session, self.session = self.session, None
        self._drafts = self.drafts
        if self.speculation is not None:
            self.speculation.close()
            self.speculation = None
        super().dropped()
        if session is not None:
            session.close()

    def told(self) -> None:
        """See Task."""
        if not self.fed and self.on_prompt is None:
            return
        try:
            self.say()
            if self.fed:
                self._reach(2)
            while self.fed:
                self.tell()
        except Exception as error:
            self.fail(error)
        except BaseException as error:  # which would end the thread that others need
            told = OptionError(f"on_token or on_prompt of this request raised {error!r}")
            told.__cause__ = error
            self.fail(told)

    def late(self) -> None:
        """See Task."""
        self.leave("deadline")

    def leave(self, why: str) -> None:
        """It is to end before its end; what comes first says why."""
        if not self.over:
            self.why, self.over = why, True

    def ended(self) -> None:
        """See Task."""
        self._reach(3)
        self.give_back(last=False)

    def _reach(self, stage: int) -> None:
        if len(self.times) <= stage:
            missing = stage + 1 - len(self.times)
            self.times += [time.monotonic()] * missing


class Request(Written):
    """An answer under way that nobody has to read, made by `model.submit`.

    An iterator of its text, also an asynchronous one; `await request` and `request.result()` give
    the whole text. Text waits until it is read. `cancel` it, or forget it, and it ends.
    """

    def __init__(self, model: Model, task: Submitted) -> None:
        super().__init__(model, task)
        self._task, self._at = task, 0

    def explain(self) -> str:
        """As of `Generation`, once it has begun."""
        if self.reuse is None:
            return "the request has not begun" + (", and is over" if self.done else " yet")
        return self.reuse.explain(self._model.tokenizer.decode)

    @property
    def text(self) -> str:
        """The text so far."""
        return self._task.answer.text

    @property
    def message(self) -> dict[str, Any]:
        """As of `Generation`, as far as it has come."""
        return self._task.options.message(self.text)

    @property
    def reason(self) -> str | None:
        """None while it is under way or when an error ended it, then as of `Generation`, or
        "deadline", or "cancelled"."""
        return self._task.answer.reason or self._task.why or None

    @property
    def done(self) -> bool:
        """Whether it is over."""
        return self._task.over

    @property
    def timings(self) -> Timings:
        """Seconds of its stages so far."""
        times = self._task.times
        now = times[3] if len(times) > 3 else time.monotonic()
        submitted, began, first = (times[:3] + [now] * 3)[:3]
        return Timings(began - submitted, first - began, now - first)

    def cancel(self) -> None:
        """End now, from any thread; what it has stays readable. Twice is once."""
        self._task.leave("cancelled")
        self._model._scheduler.end(self._task)

    close = cancel

    def result(self, timeout: float | None = None) -> str:
        """The whole text, once it is over; its error is raised. TimeoutError after seconds."""
        seconds = -1 if timeout is None else number("timeout", timeout, 0)
        self._waits(self._over)
        if not self._task.wait(self._over, seconds, end=True):
            raise TimeoutError(f"the request is not over after {timeout} s; it goes on")
        self._raise()
        return self.text

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self._waits(self._news)
        self._task.wait(self._news)
        text = self._next()
        if text is None:
            raise StopIteration
        return text

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        await self._waited(self._news, self._task.waiting)
        text = self._next()
        if text is None:
            raise StopAsyncIteration
        return text

    def __await__(self) -> Generator[Any, None, str]:
        return self._awaited().__await__()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        if hasattr(self, "_task"):
            self.cancel()

    def __reduce_ex__(self, _: object) -> Any:
        raise OptionError(
            "a request under way cannot be copied or pickled; its .text and .tokens can"
        )

    def __repr__(self) -> str:
        state = self.reason or ("failed" if self._task.error else "under way")
        return f"<Request of {len(self._task.answer.tokens)} tokens: {state}>"

    async def _awaited(self) -> str:
        try:
            await self._waited(self._over, self._task.ending)
        except asyncio.CancelledError:
            self.cancel()
            raise
        self._raise()
        return self.text

    async def _waited(self, ready: Callable[[], bool], waiting: Any) -> None:
        self._waits(ready)
        loop = asyncio.get_running_loop()
        while not ready():
            future = loop.create_future()
            waiting.append((loop, future))
            if not ready():
                await future

    def _waits(self, ready: Callable[[], bool]) -> None:
        if not ready():
            self._model._scheduler.waits()

    def _over(self) -> bool:
        return self._task.over

    def _news(self) -> bool:
        return self._task.over or len(self._task.answer.pieces) > self._at

    def _next(self) -> str | None:
        """The next text; None where there is none, as it is over."""
        pieces = self._task.answer.pieces
        if len(pieces) > self._at:
            self._at += 1
            return pieces[self._at - 1]
        self._raise()
        return None

    def _raise(self) -> None:
        if self._task.error is not None:
            raise self._task.error


def submit(
    model: Model, prompt: str | Sequence[int] | None,
    messages: str | Sequence[Mapping[str, Any]] | None, priority: float, deadline: float | None,
    options: Mapping[str, Any],
) -> Request:  # fmt: skip
    """See `TextModel.submit`."""
    if (prompt is None) == (messages is None):
        raise OptionError("give either a prompt, as to `generate`, or messages=, as to `chat`")
    priority = number("priority", priority)
    seconds = inf if deadline is None else number("deadline", deadline, 0)
    asked = prompt if messages is None else messages
    method = model.generate if messages is None else model.chat
    given = inspect.signature(method).bind(asked, **options)
    given.apply_defaults()
    keywords = dict(list(given.arguments.items())[1:])
    make = continuation if messages is None else reply
    task = Submitted(model, *make(model, asked, keywords), priority, seconds)  # type: ignore[arg-type]
    request = Request(model, task)
    model._scheduler.submit(task)
    return request
