"""Speculation of one answer: what is drafted, verified and counted."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

from runtime.engine.advance import Piece
from runtime.engine.drafted import Drafted
from runtime.engine.engine import Engine
from runtime.engine.sequence import Sequence as Evaluated
from runtime.errors import Error
from runtime.speculation.acceptance import Acceptance
from runtime.speculation.drafter import Drafter
from runtime.speculation.lengths import Lengths, Room

MOST = 15  # drafts of a step
_PAUSE, _LONGEST_PAUSE = 8, 256  # tokens until drafts that do not pay are tried again
_PROBE = 2  # so many of them
_NEW = 0.2  # how much one measurement changes of what a draft takes


class Drafts(NamedTuple):
    """What speculation did for an answer: `drafted` tokens, of which `accepted` did follow, in
    `steps`; `kind`: who drafted ("ngram", "draft" or "mtp")."""

    kind: str
    drafted: int = 0
    accepted: int = 0
    steps: int = 0


class _Watched(NamedTuple):
    """Drafts of the tokens from place `start` on."""

    drafts: list[int]
    start: int
    certainty: int


_NOTHING = _Watched([], 0, 0)


class Speculation:
    """Of one answer in one sequence, which it tells every token."""

    def __init__(
        self, engine: Engine, sequence: Evaluated, drafter: Drafter, tokens: list[int]
    ) -> None:
        """tokens: of the prompt, those of the sequence included; a list of its own."""
        self._engine, self._sequence, self._drafter = engine, sequence, drafter
        self._tokens = tokens
        self._drafted = Drafted(engine, sequence)
        self._acceptance, self._watched = Acceptance(), _NOTHING
        self._lengths = Lengths(engine, self._acceptance)
        self._each, self._waited, self._pause = 0.0, 0, _PAUSE
        self.done = Drafts(drafter.kind)

    def chosen(self, token: int) -> None:
        """It is the next token of the answer, to be evaluated next."""
        self._tokens.append(token)

    def row(self) -> np.ndarray | None:
        """The logits behind the last token where that was a draft; it is the sequence's now."""
        found = self._drafted.take(self._tokens[-1])
        if found is not None:
            self.done = self.done._replace(accepted=self.done.accepted + 1)
        return found

    def piece(self, token: int, left: int, answers: int = 1) -> Piece:
        """The last token to evaluate, with drafts behind it.

        left: how many tokens the answer may still have. answers: so many share the step.
        """
        self._learn()
        drafts = self._drafts(self._room(left, answers))
        if not drafts:
            return Piece(self._sequence, [token])
        return Piece(
            self._sequence, [token, *drafts], "all", opens=False, closes=False,
            drafted=self._drafted,
        )  # fmt: skip

    def first(self, found: np.ndarray | Error) -> np.ndarray | None:
        """Of what a step found for such a piece the row of the token; `row` has those of drafts.

        None: with drafts it cannot be evaluated.
        """
        if isinstance(found, Error):
            return None
        self._drafted.follow(found[1:])
        drafted, steps = self.done.drafted + len(found) - 1, self.done.steps + 1
        self.done = self.done._replace(drafted=drafted, steps=steps)
        return found[0]

    def settle(self) -> None:
        """The answer has ended by itself: its sequence becomes as if nothing had been drafted."""
        self._drafted.forget()
        self._engine.settle(self._sequence)

    def close(self) -> None:
        """There will be no further token."""
        self._drafted.forget()
        self._drafter.close()

    def _room(self, left: int, answers: int) -> Room:
        """What the next step has room for: not past the context, or a state to keep."""
        engine, record = self._engine, self._sequence.record
        share = min(engine.most_tokens, engine.most_rows) // answers
        end = min(engine.context, record.evaluated + share)
        if record.state is not None:
            end = min(end, record.state.next_kept)
        drafts = min(MOST, left - 1, end - record.length - 1)
        again = record.length - record.evaluated
        return Room(drafts, answers - 1, again, record.state is not None)

    def _drafts(self, room: Room) -> list[int]:
        """For the next step: as many as are worth it."""
        if room.drafts < 1:
            return []
        drafter = self._drafter
        if drafter.free:
            found = self._legal(drafter.propose(self._tokens, room.drafts)[: room.drafts])
            room = room._replace(drafts=len(found))
            n = self._lengths.best(room, drafter.certainty) if found else 0
        else:
            found = self._asked(self._wanted(room))
            n = len(found)
        if n or not self._watched.drafts:
            self._known()
            self._watched = _Watched(found, len(self._tokens), drafter.certainty)
        return found[:n]

    def _wanted(self, room: Room) -> int:
        """How many to ask a drafter for that takes time; now and then a few that do not pay."""
        n = self._lengths.best(room, self._drafter.certainty, self._each)
        if n:
            self._pause = _PAUSE
            return n
        self._waited += 1
        if self._waited < self._pause:
            return 0
        self._waited, self._pause = 0, min(2 * self._pause, _LONGEST_PAUSE)
        return min(_PROBE, room.drafts)

    def _asked(self, most: int) -> list[int]:
        """Up to `most` drafts of one that takes time, which is measured."""
        if not most:
            return []
        begun = time.perf_counter()
        found = self._legal(self._drafter.propose(self._tokens, most)[:most])
        each = (time.perf_counter() - begun) / max(1, len(found))
        self._each += _NEW * (each - self._each) if self._each else each
        return found

    def _legal(self, drafts: list[int]) -> list[int]:
        """Up to the first that is no token of the model."""
        fits = [0 <= token < self._engine.vocabulary for token in drafts]
        return drafts if all(fits) else drafts[: fits.index(False)]

    def _learn(self) -> None:
        """From drafts whose text is known by now, whether they were verified or not."""
        followed, known = self._follow()
        if followed < known or known == len(self._watched.drafts):
            self._known()

    def _known(self) -> None:
        """Watch them no longer."""
        self._acceptance.learn(self._watched.certainty, *self._follow())
        self._watched = _NOTHING

    def _follow(self) -> tuple[int, int]:
        """How many of the drafts watched did follow, and of how many that is known."""
        drafts, start, _ = self._watched
        text = self._tokens[start : start + len(drafts)]
        for i, token in enumerate(text):
            if token != drafts[i]:
                return i, i + 1
        return len(text), len(text)
