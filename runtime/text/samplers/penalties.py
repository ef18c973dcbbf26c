"""Penalties on tokens that stand among the last ones."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from runtime.text.samplers.candidates import Candidates


@dataclass
class Penalties:
    """Divides (positive) or multiplies (negative) logits of the last `last_n` tokens by `repeat`
    (Keskar et al. 2019, arXiv:1909.05858), then takes off `frequency` for each time one was seen
    and `presence` once. last_n -1: all tokens."""

    repeat: float
    presence: float
    frequency: float
    last_n: int
    _seen: deque[int] = field(default_factory=deque)
    _counts: Counter[int] = field(default_factory=Counter)

    def begin(self, tokens: Sequence[int]) -> None:
        """Remember the tokens of a prompt."""
        for token in tokens if self.last_n < 0 else tokens[-self.last_n :]:
            self.accept(token)

    def accept(self, token: int) -> None:
        """Remember a token."""
        self._seen.append(token)
        self._counts[token] += 1
        if 0 <= self.last_n < len(self._seen):
            oldest = self._seen.popleft()
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]

    def __call__(self, c: Candidates) -> Candidates:
        """Changes the logits in their array."""
        tokens = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
        counts = np.fromiter(self._counts.values(), np.float64, len(self._counts))
        at, which = c.places(tokens)
        values = c.values[at].astype(np.float64)
        scaled = np.where(values > 0, values / self.repeat, values * self.repeat)
        c.change(at, scaled - counts[which] * self.frequency - self.presence)
        return c
