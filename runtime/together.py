"""Several answers of one model read together: one step evaluates a token of each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from runtime.arguments import listed
from runtime.errors import Error, OptionError
from runtime.generation import Generation

if TYPE_CHECKING:
    from runtime.model import Model


class Together:
    """An iterator of (number of the answer, text): see `TextModel.together`."""

    def __init__(self, model: Model, answers: Iterable[Generation]) -> None:
        self._engine = model._engine
        self._answers: list[Generation] = listed("answers", answers, "a list of answers")
        for answer in self._answers:
            if not isinstance(answer, Generation) or answer._session.model is not model:
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
            live = [n for n, answer in enumerate(self._answers) if not answer._over]
            if not live:
                raise StopIteration
            self._round(live)
        return self._ready.popleft()

    def _round(self, live: Sequence[int]) -> None:
        """A token more of each: those of prompts one by one, the others in one step."""
        taken: list[Generation] = []
        try:
            for n in live:
                self._answers[n]._take_turn()
                taken.append(self._answers[n])
            fresh = [n for n in live if not self._answers[n]._answer.tokens]
            for n in fresh:
                self._show(n, self._answers[n]._first)
            self._decode([n for n in live if n not in fresh and self._kept(n)])
        finally:
            for answer in taken:
                answer._reading.release()
            last = all(answer._over for answer in self._answers)
            for answer in taken:
                if answer._over:
                    answer._give_back(last)

    def _decode(self, some: Sequence[int]) -> None:
        answers = [self._answers[n] for n in some]
        wanted = [each for answer in answers if (each := answer._next()) is not None]
        decoder = self._engine.decoder if len(wanted) == len(answers) else None
        found: Sequence[int | np.ndarray | Exception] | None = None
        if decoder is not None:
            found = decoder.choose_all(wanted)
        if found is None:
            found = self._rows(answers)
        for n, answer, result in zip(some, answers, found, strict=True):
            if isinstance(result, Exception):
                self._fail(n, result)
            else:
                self._show(n, lambda a=answer, row=result: a._took(a._fed_by(row)))  # type: ignore[misc]

    def _rows(self, answers: Sequence[Generation]) -> list[np.ndarray | Error]:
        """The logits after what is pending of each, from what drafts found or a step."""
        found: list[np.ndarray | Error | None] = [answer._drafted() for answer in answers]
        for alone in (False, True):
            rest = [n for n, row in enumerate(found) if row is None]
            if not rest:
                break
            pieces = [answers[n]._piece(len(rest), alone) for n in rest]
            for n, piece, rows in zip(rest, pieces, self._engine.run(pieces), strict=True):
                found[n] = answers[n]._row(piece, rows)
        return [row for row in found if row is not None]

    def _kept(self, n: int) -> bool:
        """Whether an answer can go on: its session is as it left it."""
        try:
            self._answers[n]._check_session()
        except OptionError as error:
            self._fail(n, error)
        return not self._answers[n]._over

    def _show(self, n: int, step: Callable[[], str]) -> None:
        try:
            if text := step():
                self._ready.append((n, text))
        except Exception as error:  # of who is told of tokens, too: the others go on
            self._fail(n, error)

    def _fail(self, n: int, error: Exception) -> None:
        self._answers[n]._over = True
        self._errors.append(error)
