"""How likely drafts are to follow: learnt from those whose text is known by now."""

from __future__ import annotations

# for each certainty, of texts that repeat some of what they had before
_FIRST_BEFORE = (0.3, 0.4, 0.55, 0.7, 0.8, 0.85, 0.9, 0.95)
_REST_BEFORE = (0.65, 0.7, 0.78, 0.82, 0.85, 0.88, 0.92, 0.95)
_FIRST, _REST = 0.08, 0.05  # how much one draft changes of what is known
_MOST = 0.99


class Acceptance:
    """Of one answer, for each certainty of its drafter: of a first draft, and of one that comes
    behind another that did follow."""

    def __init__(self) -> None:
        self._first, self._rest = list(_FIRST_BEFORE), list(_REST_BEFORE)

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
