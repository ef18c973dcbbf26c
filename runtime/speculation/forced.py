"""Drafts of what a grammar leaves no choice about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from runtime.engine.sequence import Sequence as Evaluated
from runtime.speculation.drafter import MOST, Drafter

if TYPE_CHECKING:
    from runtime.text.grammar.guide import Constraint

Drafters = Callable[[Evaluated], Sequence[Drafter]] | None


def with_forced(constraint: Constraint, others: Drafters) -> Drafters:
    """The drafters of an answer, with one for what its grammar forces; None: nobody drafts."""
    if others is None:
        return None
    return lambda sequence: [Forced(constraint), *others(sequence)]


class Forced:
    """A Drafter: the tokens that have to come next."""

    kind, free, certainty, most = "grammar", True, 7, MOST

    def __init__(self, constraint: Constraint) -> None:
        """constraint: of the answer, which has all of its tokens."""
        self._constraint = constraint

    def begin(self, tokens: Sequence[int]) -> None:
        """See Drafter."""

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """See Drafter."""
        return self._constraint.forced()[:most]

    def close(self) -> None:
        """See Drafter."""
