"""How likely drafts are to follow: learnt from those whose text is known by now."""

from __future__ import annotations

CERTAINTIES = 8
_FIRST, _REST = 0.08, 0.05  # how much one draft changes of what is known
_MOST = 0.99


class Acceptance:
    """Of one answer, for each certainty of its drafter: of a first draft, and of one that comes
    behind another that did follow."""

    def __init__(self) -> None:
        self._first = [0.2 + 0.1 * c for c in range(CERTAINTIES)]
        self._rest = [0.6 + 0.05 * c for c in range(CERTAINTIES)]

    def learn(self, certainty: int, followed: int, known: int) -> None:
        """Of `known` drafts, up to the first that did not, so many did follow."""
        first, rest = self._first, self._rest
        if known:
            first[certainty] += _FIRST * ((followed > 0) - first[certainty])
        for i in range(1, known):
            rest[certainty] += _REST * (_MOST * (i < followed) - rest[certainty])

    def expected(self, certainty: int, drafts: int) -> float:
        """How many of so many drafts are likely to follow."""
        rest = self._rest[certainty]
        return self._first[certainty] * (1 - rest**drafts) / (1 - rest)

    def whole(self, certainty: int, drafts: int) -> float:
        """How likely all of them are to follow."""
        return self._first[certainty] * self._rest[certainty] ** (drafts - 1) if drafts else 1.0
