"""DRY, "don't repeat yourself": a penalty on tokens that would go on repeating a passage.

By p-e-w, text-generation-webui pull request 5677 (2024). Where the last n tokens stood before,
the token that followed them there loses multiplier * base ** (n - allowed_length), for the
longest such n that is at least allowed_length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from runtime.text.samplers.candidates import Candidates

_LARGEST_EXPONENT = 88.0  # of e, in float32


@dataclass
class Dry:
    """DRY over the last `last_n` tokens (-1: all), with the text of tokens as `token_bytes` gives
    it. A passage ends where one of `breakers` does, and a token that holds one is not penalised.
    """

    multiplier: float
    base: float
    allowed_length: int
    last_n: int
    breakers: tuple[bytes, ...]
    token_bytes: Callable[[int], bytes]
    _seen: list[int] = field(default_factory=list)
    _since_break: int = 0  # tokens since the one in which a breaker ended
    _tail: bytes = b""  # the last text, in which a breaker may have begun

    def begin(self, tokens: Sequence[int]) -> None:
        """Remember the tokens of a prompt."""
        for token in tokens if self.last_n < 0 else tokens[-self.last_n :]:
            self.accept(token)

    def accept(self, token: int) -> None:
        """Remember a token."""
        self._seen.append(token)
        if len(self._seen) > 2 * self.last_n >= 0:
            del self._seen[: -self.last_n]
        if self.breakers:
            self._look_for_break(self.token_bytes(token))

    def _look_for_break(self, new: bytes) -> None:
        old, text = len(self._tail), self._tail + new
        ended = any(text.find(b, max(0, old - len(b) + 1)) >= 0 for b in self.breakers)
        self._since_break = 0 if ended else self._since_break + 1
        longest = max(map(len, self.breakers)) - 1
        self._tail = text[-longest:] if longest else b""

    def __call__(self, c: Candidates) -> Candidates:
        """Changes the logits in their array."""
        lengths = self._repeats()
        for token in [t for t in lengths if self._has_breaker(t)]:
            del lengths[token]
        if not lengths:
            return c
        tokens = np.fromiter(lengths.keys(), np.int64, len(lengths))
        exponents = np.fromiter(lengths.values(), np.float64, len(lengths)) - self.allowed_length
        at, which = c.places(tokens)
        penalty = self.multiplier * self.base ** exponents[which]
        c.change(at, c.values[at].astype(np.float64) - penalty)
        return c

    def _repeats(self) -> dict[int, int]:
        """token -> the longest passage, at the end of what was seen, that it followed before."""
        seen = self._seen if self.last_n < 0 else self._seen[-self.last_n :]
        most = min(len(seen), self._since_break if self.breakers else len(seen), self._longest())
        if most < self.allowed_length:
            return {}
        ids, found = np.array(seen, np.int64), {}
        ends = np.flatnonzero(ids[:-1] == ids[-1])  # where a passage ends as this text does
        for length in range(1, most + 1):
            longer = np.zeros(ends.size, bool)
            if length < most:
                longer = (ends >= length) & (ids[ends - length] == ids[-1 - length])
            if length >= self.allowed_length:
                found.update(dict.fromkeys(ids[ends[~longer] + 1].tolist(), length))
            ends = ends[longer]
            if not ends.size:
                break
        return found

    def _longest(self) -> int:
        """Passages longer than this have the same, largest penalty."""
        if self.base <= 1:
            return self.allowed_length
        return self.allowed_length + int(_LARGEST_EXPONENT / math.log(self.base))

    def _has_breaker(self, token: int) -> bool:
        return bool(self.breakers) and any(b in self.token_bytes(token) for b in self.breakers)
