"""Drafts of the block of a file that predicts further tokens (NextN, MTP)."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.engine.nextn import MOST, NextNDrafts
from runtime.engine.sequence import Sequence as Evaluated

_SURE = 0.4  # least probability of a draft, by what the block says


class NextNDrafter:
    """A Drafter: what the block says to the last hidden row of the answer's own sequence."""

    kind, free, certainty, most = "mtp", False, 6, MOST

    def __init__(self, drafts: NextNDrafts, sequence: Evaluated) -> None:
        self._drafts, self._sequence = drafts, sequence

    def begin(self, tokens: Sequence[int]) -> None:
        """See Drafter."""
        self._drafts.make_ready()

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """See Drafter."""
        (found,) = self._drafts.of([(self._sequence, tokens[-1])], most, _SURE)
        return found

    def close(self) -> None:
        """See Drafter; it holds nothing."""
