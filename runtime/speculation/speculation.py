"""Speculation of one answer: what is drafted, verified and counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from runtime.engine.advance import Piece
from runtime.engine.drafted import Drafted
from runtime.engine.engine import Engine
from runtime.engine.sequence import Sequence as Evaluated
from runtime.errors import Error
from runtime.speculation.drafter import MOST, Drafter
from runtime.speculation.lengths import Room
from runtime.speculation.source import Offer, Source


class Drafts(NamedTuple):
    """What speculation did for an answer: `drafted` tokens, of which `accepted` did follow, in
    `steps` of it, and `kinds`: how many of the drafts were whose ("ngram", "draft", "mtp")."""

    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    kinds: Mapping[str, int] = MappingProxyType({})


class Speculation:
    """Of one answer in one sequence, which it tells every token."""

    def __init__(
        self, engine: Engine, sequence: Evaluated, drafters: Sequence[Drafter], tokens: list[int]
    ) -> None:
        """tokens: of the prompt, those of the sequence included; a list of its own."""
        self._engine, self._sequence, self._tokens = engine, sequence, tokens
        self._sources = [Source(engine, drafter, tokens) for drafter in drafters]
        self._drafted = Drafted(engine, sequence)
        self._kind = ""
        self.done = Drafts()

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
        self._drafted.follow(found[1:].copy())
        done, new, kind = self.done, len(found) - 1, self._kind
        kinds = {**done.kinds, kind: done.kinds.get(kind, 0) + new}
        self.done = Drafts(done.drafted + new, done.accepted, done.steps + 1, kinds)
        return found[0]

    def settle(self) -> None:
        """The answer has ended by itself: its sequence becomes as if nothing had been drafted."""
        self._drafted.forget()
        self._engine.settle(self._sequence)

    def close(self) -> None:
        """There will be no further token."""
        self._drafted.forget()
        for source in self._sources:
            source.drafter.close()

    def _room(self, left: int, answers: int) -> Room:
        """What the next step has room for: not past the context, or a state to keep."""
        engine, record = self._engine, self._sequence.record
        share = min(engine.most_tokens, engine.most_rows) // answers
        end = min(engine.context, record.evaluated + share)
        if record.state is not None:
            end = min(end, record.state.next_kept)
        drafts = min(MOST, left - 1, end - record.length - 1)
        again = record.length - record.evaluated
        return Room(drafts, answers, again, record.state is not None)

    def _drafts(self, room: Room) -> list[int]:
        """For the next step: of who makes the most tokens of a second, as many as do."""
        if room.drafts < 1:
            return []
        best = max((source.offer(room) for source in self._sources), key=_worth)
        found = best.source.drafts(best) if best.drafts else []
        self._kind = best.source.drafter.kind
        return found


def _worth(offer: Offer) -> tuple[bool, float]:
    return offer.drafts > 0, offer.rate
