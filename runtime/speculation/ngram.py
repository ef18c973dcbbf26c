"""Drafts from the text itself: what followed the last time that the same tokens stood there.

Places where the same two or five tokens end are chained, the last first, through arrays of 4
bytes a token; no model is asked. A match once found grows with the text, so that most tokens take
one comparison.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from runtime.speculation.drafter import MOST

_LONG, _SHORT = 5, 2  # tokens that a chain's places have in common
_WALK = 16  # places of a chain that are looked at
_FAR = 40  # tokens that matches are compared over
_LEAST_BITS, _MOST_BITS = 12, 18  # of hashes
_FACTOR, _32_BITS = 0x9E3779B1, 0xFFFFFFFF
_CERTAINTIES = (3, 4, 6, 9, 16, 32, 64)  # least length of a match for each from 1 on


class Ngrams:
    """A Drafter: how the text went on behind the longest match of its end, of equals the last."""

    kind, free, most = "ngram", True, MOST

    def __init__(self) -> None:
        self.certainty = 0
        self._seen = 0  # tokens of the text that are chained
        self._at = -1  # where in the text it goes on, if it does as before
        self._length = 0  # of the match before there
        self._chains: tuple[_Chain, ...] = ()

    def begin(self, tokens: Sequence[int]) -> None:
        """See Drafter."""
        self._chains = _Chain(tokens, _LONG), _Chain(tokens, _SHORT)
        self._seen = max(0, len(tokens) - 1)

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """See Drafter."""
        self._follow(tokens)
        at = self._at
        if at < 0:
            return []
        self.certainty = bisect_right(_CERTAINTIES, self._length)
        period = len(tokens) - at
        if most <= period:
            return list(tokens[at : at + most])
        return [tokens[at + i % period] for i in range(most)]

    def close(self) -> None:
        """See Drafter."""
        self._chains = ()

    def _follow(self, tokens: Sequence[int]) -> None:
        """Chain what is new, and find where the text goes on."""
        while self._seen < len(tokens):
            at, token = self._at, tokens[self._seen]
            end = self._seen = self._seen + 1
            same = at >= 0 and tokens[at] == token
            self._at, self._length = (at + 1, self._length + 1) if same else (-1, 0)
            for chain in self._chains:
                last = chain.add(tokens, end)
                if last >= 0 and self._length <= _LONG:
                    self._longest(chain, tokens, last, end)

    def _longest(self, chain: _Chain, tokens: Sequence[int], at: int, end: int) -> None:
        """A longer match of the tokens before `end`, if there is one, from that at `at` on."""
        for _ in range(_WALK):
            length = _common(tokens, at, end)
            if length > max(self._length, _SHORT - 1):
                self._at, self._length = at, length
            at = chain.before[at]
            if at < 0:
                return


class _Chain:
    """Ends of the same `n` tokens: the last one for each hash, and for each end the one before."""

    def __init__(self, tokens: Sequence[int], n: int) -> None:
        """With all ends but that of the whole text."""
        self._n = n
        bits = min(_MOST_BITS, max(_LEAST_BITS, (2 * len(tokens)).bit_length()))
        self._shift = 32 - bits
        last = np.full(1 << bits, -1, np.int32)
        before = np.full(max(1, len(tokens)), -1, np.int32)
        ends = np.arange(n, len(tokens))
        if len(ends):
            ids, hashes = np.array(tokens, np.uint64), np.zeros(len(ends), np.uint64)
            for i in range(n):
                hashes = (hashes ^ ids[i : i + len(ends)]) * np.uint64(_FACTOR) & np.uint64(
                    _32_BITS
                )
            hashes >>= np.uint64(self._shift)
            order = np.argsort(hashes, kind="stable")
            same = hashes[order[1:]] == hashes[order[:-1]]
            before[ends[order[1:]]] = np.where(same, ends[order[:-1]], -1)
            last[hashes[order]] = ends[order]
        self._last, self.before = array("i", last.tobytes()), array("i", before.tobytes())

    def add(self, tokens: Sequence[int], end: int) -> int:
        """Another end, behind all there are; the last one of the same hash, or -1."""
        if end < self._n:
            self.before.append(-1)
            return -1
        found = self._bucket(tokens, end)
        last = self._last[found]
        self.before.append(last)
        self._last[found] = end
        return last

    def _bucket(self, tokens: Sequence[int], end: int) -> int:
        h = 0
        for token in tokens[end - self._n : end]:
            h = (h ^ token) * _FACTOR & _32_BITS
        return h >> self._shift


def _common(tokens: Sequence[int], a: int, b: int) -> int:
    """How many tokens before `a` are those before `b`, up to _FAR."""
    most = min(a, _FAR)
    for i in range(1, most + 1):
        if tokens[a - i] != tokens[b - i]:
            return i - 1
    return most
