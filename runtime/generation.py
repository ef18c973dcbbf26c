"""Generation: an answer under way, read piece by piece; it evaluates a token when asked for one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

from runtime.errors import OptionError
from runtime.writing import Options, Prompt, Writing, Written

if TYPE_CHECKING:
    from runtime.model import Model


class Generation(Written):
    """An answer under way: an iterator of its text, made by `model.generate` and `model.chat`.

    Nothing is evaluated before the first piece is asked for. Left early, `close` it (or use
    `with`): a session of its own gives its memory back. An exception ends it too.
    """

    def __init__(self, model: Model, prompt: Prompt, options: Options) -> None:
        super().__init__(model, Writing(model, prompt, options))
        self._closed = False
        self._reading = threading.Lock()

    @property
    def reason(self) -> str | None:
        """None until the answer has ended, then "end" (the model said so), "stop" (a stop
        string), "length" (max_tokens) or "context" (the context is full). It stays None where
        the answer was closed early."""
        return self._writing.answer.reason

    def explain(self) -> str:
        """Lines that say what of the prompt was not read again, and why not more of it: `reuse` in
        words. The answer is begun for it."""
        self._take_turn()
        try:
            if not self._closed:
                self._writing.begin()
        finally:
            self._reading.release()
        if self.reuse is None:
            return "the answer was closed before it began"
        return self.reuse.explain(self._model.tokenizer.decode)

    @property
    def text(self) -> str:
        """The whole answer; what is still to come is generated first."""
        for _ in self:
            pass
        return self._writing.answer.text

    @property
    def message(self) -> dict[str, Any]:
        """The whole answer as a message of OpenAI's interface, for the next `chat`: its content,
        apart from it its reasoning ("reasoning_content") and the calls of tools ("tool_calls")."""
        return self._writing.options.message(self.text)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self._take_turn()
        try:
            return self._next_piece()
        except BaseException:  # StopIteration among them
            self._closed = True
            raise
        finally:
            self._reading.release()
            if not self._left():
                self._writing.give_back()

    def close(self) -> None:
        """End early, from any thread; a session of its own is given back. Twice is once."""
        self._closed = True  # who reads just now sees it and gives back after the token under way
        if self._reading.acquire(blocking=False):
            self._reading.release()
            self._writing.give_back()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce_ex__(self, _: object) -> Any:
        raise OptionError(
            "an answer under way holds a session of its model and cannot be copied or pickled; "
            "its .text and .tokens can, and the same seed gives the same answer again"
        )

    def __repr__(self) -> str:
        state = self.reason or ("closed" if not self._left() else "iterate it, or take .text")
        return f"<Generation of {len(self._writing.answer.tokens)} tokens: {state}>"

    def _take_turn(self) -> None:
        """Be the one who reads, until `_reading` is released."""
        if not self._reading.acquire(blocking=False):
            raise OptionError(
                "this answer is being read already, by another thread or around this very call; "
                "read it in one place (close() may be called from anywhere)"
            )

    def _next_piece(self) -> str:
        writing = self._writing
        if not self._closed:
            writing.begin()
        while not self._closed:
            text = writing.tell()
            if text:
                return text
            if writing.fed:
                continue
            if writing.over:
                break
            self._model._scheduler.advance([writing])
            self._raise()
        raise StopIteration

    def _raise(self) -> None:
        """The error that has ended it, once."""
        error, self._writing.error = self._writing.error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # or it and what it remembers of its way would hold one another

    def _left(self) -> bool:
        """Whether there is more to read."""
        return not self._closed and bool(self._writing.fed or not self._writing.over)
