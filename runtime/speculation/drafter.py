"""What proposes the next tokens of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

MOST = 15  # drafts of a step


class Drafter(Protocol):
    """Of one answer. `kind`: its name among the ways of speculation ("ngram", "draft", "mtp").

    free: asking it costs next to nothing, so that it is asked for every token and learnt from
    where its drafts are not verified, too. certainty: how sure it is of what it proposed last,
    from 0 to 7; how likely drafts are to follow is learnt for each apart. most: drafts in one go.
    """

    kind: str
    free: bool
    certainty: int
    most: int

    def begin(self, tokens: Sequence[int]) -> None:
        """The answer to `tokens` is drafted from now on; its first token is the last of them."""
        ...

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `tokens`; none where it has no idea.

        tokens: of prompt and answer, the last one not yet evaluated. It is the same list at every
        call of one answer, which only grows, by one token or several; it is not to be changed.
        """
        ...

    def close(self) -> None:
        """Give back what it holds: the answer is over. Twice is once."""
        ...
