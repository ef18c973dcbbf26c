"""Several answers of one model read together: one step evaluates a token of each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from runtime.arguments import listed
from runtime.errors import OptionError
from runtime.generation import Generation

if TYPE_CHECKING:
    from runtime.model import Model


class Together:
    """An iterator of (number of the answer, text): see `TextModel.together`."""

    def __init__(self, model: Model, answers: Iterable[Generation]) -> None:
        self._scheduler = model._scheduler
        self._answers: list[Generation] = listed("answers", answers, "a list of answers")
        for answer in self._answers:
            if not isinstance(answer, Generation) or answer._model is not model:
                raise OptionError("only answers of the same model can be read together")
        if len(set(map(id, self._answers))) < len(self._answers):
            raise OptionError("an answer stands twice among those to be read together")
        self._ready = deque[tuple[int, str]]()
        self._errors = deque[Exception]()

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return self

    def __next__(self) -> tuple[int, str]:
        while not self._ready:
            if self._errors:
                raise self._errors.popleft()
            live = [n for n, answer in enumerate(self._answers) if answer._left()]
            if not live:
                raise StopIteration
            self._round(live)
        return self._ready.popleft()

    def _round(self, live: Sequence[int]) -> None:
        """A token more of all that can have one in the next step."""
        taken: list[Generation] = []
        try:
            for n in live:
                self._answers[n]._take_turn()
                taken.append(self._answers[n])
            for n in live:
                self._try(n, self._answers[n]._writing.begin)
            going = [n for n in live if self._answers[n]._left()]
            writings = [self._answers[n]._writing for n in going]
            if going and not any(writing.fed for writing in writings):
                self._scheduler.advance(writings)
            for n in going:
                self._show(n)
        finally:
            for answer in taken:
                answer._reading.release()
            last = not any(answer._left() for answer in self._answers)
            for answer in taken:
                if not answer._left():
                    answer._writing.give_back(last)

    def _show(self, n: int) -> None:
        """The next text of an answer, where there is some; its error."""
        answer = self._answers[n]
        if answer._writing.error is not None:
            self._try(n, answer._raise)
        elif text := self._try(n, answer._writing.tell):
            self._ready.append((n, text))

    def _try(self, n: int, step: Callable[[], Any]) -> Any:
        """What a step of one answer gives; an error ends that one, and the others go on."""
        try:
            return step()
        except Exception as error:  # of who is told of tokens, too
            self._answers[n]._closed = True
            self._errors.append(error)
