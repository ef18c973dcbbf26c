"""Candidates: the tokens that may still be chosen, with their logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(slots=True)
class Candidates:
    """Tokens and their logits, on their way through the samplers.

    ids: int64 [n], or None for every token of the vocabulary. values: [n], float32 in the order
    of the ids as the model gives them; float64 once `best_first` (ties to the lowest id) or
    divided by a temperature. -inf is a token that cannot be chosen; nothing else is not finite.
    """

    values: np.ndarray
    ids: np.ndarray | None = None
    best_first: bool = False

    def take(self, at: np.ndarray | slice) -> Candidates:
        """Those at these places, in this order, which keeps the best first if they are."""
        if self.ids is not None:
            ids = self.ids[at]
        else:
            ids = np.arange(self.values.size)[at] if isinstance(at, slice) else at
        return Candidates(self.values[at], ids, self.best_first)

    def places(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(places, which): where those of `tokens` are that have not been filtered out."""
        if self.ids is None:  # a prompt may hold ids of padding, which cannot be chosen
            which = np.flatnonzero(tokens < self.values.size)
            return tokens[which], which
        order = np.argsort(self.ids)
        at = order[np.searchsorted(self.ids, tokens, sorter=order).clip(max=order.size - 1)]
        which = np.flatnonzero(self.ids[at] == tokens)
        return at[which], which

    def change(self, places: np.ndarray, values: np.ndarray) -> None:
        """Other logits at these places, in this very array; too large ones become the largest."""
        if self.values.dtype == np.float32:
            values = np.where(values == -np.inf, values, values.clip(-_LARGEST, _LARGEST))
        self.values[places] = values
        self.best_first = False


def best(c: Candidates, k: int) -> Candidates:
    """The k best of them, best first; equal ones by id."""
    if c.best_first:
        return c.take(slice(k)) if k < c.values.size else c
    if 0 < k < c.values.size:
        # A threshold from np.partition is several times faster than np.argpartition.
        threshold = np.partition(c.values, c.values.size - k)[c.values.size - k]
        c = c.take(np.flatnonzero(c.values >= threshold))
    found = c.take(_order(c)[:k])
    return Candidates(found.values.astype(np.float64), found.ids, True)


def ordered(c: Candidates) -> Candidates:
    """All of them, best first."""
    return best(c, c.values.size)


def softmax(values: np.ndarray) -> np.ndarray:
    """Probabilities, float64, of these logits."""
    powers = np.exp(values - np.float64(np.maximum.reduce(values)))
    return powers / np.add.reduce(powers)


def _order(c: Candidates) -> np.ndarray:
    if c.values.dtype == np.float32:
        return _descending(c.values)
    ids = np.arange(c.values.size) if c.ids is None else c.ids
    return np.lexsort((ids, -c.values))


def _descending(values: np.ndarray) -> np.ndarray:
    """The stable descending order of float32 `values`.

    Sorts integers that hold the value's bits above its place: five times faster than argsort.
    """
    bits = (values + np.float32(0)).view(np.int32)  # + 0 makes -0 equal 0
    ascending = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    keys = ((~ascending).astype(np.int64) << 32) | np.arange(values.size)
    keys.sort()
    return keys & 0xFFFFFFFF
