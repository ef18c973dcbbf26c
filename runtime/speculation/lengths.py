"""How many drafts a step is given: as many as make the most tokens of a second."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from runtime.engine.engine import Engine
from runtime.engine.graphs import bucket, capacity
from runtime.speculation.acceptance import Acceptance

_WORTH = 1.15  # how much faster drafts have to be


class Room(NamedTuple):
    """Of a step: most `drafts`; how many `answers` share it, which may all be drafted alike;
    tokens that are evaluated `again`, in front of the one that is pending; `recurrent`: a draft
    that does not follow has those before it evaluated again."""

    drafts: int
    answers: int = 1
    again: int = 0
    recurrent: bool = False


class Lengths:
    """Of the steps of one engine, for drafts that follow as they do in one answer.

    A program of another size is made once what it would have saved comes to what making it takes.
    """

    def __init__(self, engine: Engine, acceptance: Acceptance) -> None:
        self._engine, self._costs, self._acceptance = engine, engine.costs, acceptance

    def best(self, room: Room, certainty: int, each: float = 0.0) -> tuple[int, float]:
        """How many drafts of such certainty, and how many tokens of a second that makes.

        0: none. each: seconds that it takes to find one.
        """
        best, most = 0, self._rate(room, 0, certainty, each) * _WORTH
        tokens = room.answers * (1 + self._acceptance.expected(certainty, room.drafts))
        if tokens <= most * self._costs.of(2 * room.answers + room.again):
            return best, most  # all of them would not pay for a step of one more
        missing, more = 0, most
        for n in _lengths(room):
            rate = self._rate(room, n, certainty, each)
            if rate > most and self._engine.programs.made(*_live(room, n)):
                best, most = n, rate
            elif rate > more:
                missing, more = n, rate
        if more > most and self._pays(room, missing, certainty, most, more):
            return missing, more
        return best, most

    def _rate(self, room: Room, drafts: int, certainty: int, each: float) -> float:
        """Tokens of a second."""
        of, answers = self._costs.of, room.answers
        seconds = of(_live(room, drafts)[0]) + answers * drafts * each
        follow = self._acceptance.expected(certainty, drafts)
        if room.recurrent and drafts:
            repeated = of(answers * (2 + int(follow))) - of(answers)
            seconds += (1 - self._acceptance.whole(certainty, drafts)) * repeated
        return answers * (1 + follow) / max(seconds, 1e-9)

    def _pays(self, room: Room, drafts: int, certainty: int, rate: float, more: float) -> bool:
        """Whether it is time to make a program that makes `more` tokens of a second."""
        sizes, saved = capacity(*_live(room, drafts)), self._costs.saved
        tokens = room.answers * (1 + self._acceptance.expected(certainty, drafts))
        saved[sizes] = saved.get(sizes, 0.0) + tokens / rate - tokens / more
        return saved[sizes] >= self._costs.making


def _live(room: Room, drafts: int) -> tuple[int, int]:
    """Tokens and rows of such a step."""
    rows = room.answers * (1 + drafts)
    return room.again + rows, rows


def _lengths(room: Room) -> Iterator[int]:
    """Those that fill a program, and the most."""
    size = bucket(2 * room.answers + room.again)
    while (n := (size - room.again) // room.answers - 1) < room.drafts:
        if n:
            yield n
        size *= 2
    if room.drafts:
        yield room.drafts
