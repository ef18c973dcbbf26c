"""Speculation of one answer: what is drafted, verified and counted."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from runtime.engine.advance import Piece
from runtime.engine.drafted import Drafted
from runtime.engine.engine import Engine
from runtime.engine.sequence import Sequence as Evaluated
from runtime.errors import Error
from runtime.speculation.drafter import Drafter

MOST = 15  # drafts of a step


class Drafts(NamedTuple):
    """What speculation did for an answer: `drafted` tokens, of which `accepted` did follow, in
    `steps`; `kind`: who drafted ("ngram", "draft" or "mtp")."""

    kind: str
    drafted: int = 0
    accepted: int = 0
    steps: int = 0


class Speculation:
    """Of one answer in one sequence, which it tells every token."""

    def __init__(
        self, engine: Engine, sequence: Evaluated, drafter: Drafter, tokens: list[int]
    ) -> None:
        """tokens: of the prompt, those of the sequence included; a list of its own."""
        self._engine, self._sequence, self._drafter = engine, sequence, drafter
        self._tokens = tokens
        self._drafted = Drafted(engine, sequence)
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
        drafts = self._drafts(min(MOST, left - 1, self._room(answers) - 1))
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

    def _room(self, answers: int) -> int:
        """Tokens that the next step may have: not past the context, or a state to keep."""
        engine, record = self._engine, self._sequence.record
        share = min(engine.most_tokens, engine.most_rows) // answers
        end = min(engine.context, record.evaluated + share)
        if record.state is not None:
            end = min(end, record.state.next_kept)
        return end - record.length

    def _drafts(self, most: int) -> list[int]:
        if most < 1:
            return []
        found = self._drafter.propose(self._tokens, most)[:most]
        fits = [0 <= token < self._engine.vocabulary for token in found]
        return found if all(fits) else found[: fits.index(False)]
