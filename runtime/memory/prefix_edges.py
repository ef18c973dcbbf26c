"""Edges of a tree of token sequences: their tokens, the pages of these, and states after them.

An edge holds what several sequences have in common, or what one of them has alone; it may begin
and end in the middle of a page. The page in which an edge ends is then held by the edges that go
on from there as well, by each its own copy or the same. Edges are values.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from runtime.ops import PAGE

KEY = 16  # bytes of a block's key


def alike(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many elements both begin with."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a block: a digest of that of the one before it, and of its tokens."""
    return hashlib.blake2b(parent + array("i", tokens).tobytes(), digest_size=KEY).digest()


def block_keys(keys: list[bytes], root: bytes, tokens: Sequence[int], length: int) -> list[bytes]:
    """`keys` of the first blocks of `tokens`, with those of all whole blocks up to `length`.

    A key is a digest of all tokens up to the block's end and of `root`.
    """
    for block in range(len(keys), length // PAGE):
        parent = keys[-1] if keys else root
        keys.append(block_key(parent, tokens[block * PAGE : (block + 1) * PAGE]))
    return keys


class State:
    """The recurrent state after `place` tokens lies in `slot`. `used`: when it was last of use."""

    __slots__ = ("message_end", "place", "slot", "used")

    def __init__(self, place: int, slot: int, message_end: bool, used: int) -> None:
        self.place, self.slot, self.message_end, self.used = place, slot, message_end, used


class Edge(NamedTuple):
    """Tokens from place `start` on.

    tokens: int32. pages: int32, of all blocks that it touches. keys: of the blocks that end in
    it, its last place included. states: after its tokens, in order.
    """

    start: int
    tokens: np.ndarray
    pages: np.ndarray
    keys: tuple[bytes, ...] = ()
    states: tuple[State, ...] = ()

    @property
    def stop(self) -> int:
        """The place behind its last token."""
        return self.start + len(self.tokens)

    @property
    def first(self) -> int:
        """Its first token."""
        return int(self.tokens[0])

    def before(self, place: int) -> Edge:
        """What of it lies before a place within it."""
        first = self.start // PAGE
        return Edge(
            self.start, self.tokens[: place - self.start].copy(),
            self.pages[: -(-place // PAGE) - first].copy(),
            self.keys[: place // PAGE - first], tuple(s for s in self.states if s.place <= place),
        )  # fmt: skip

    def behind(self, place: int) -> Edge:
        """What of it lies behind a place within it."""
        blocks = place // PAGE - self.start // PAGE
        return Edge(
            place, self.tokens[place - self.start :].copy(), self.pages[blocks:].copy(),
            self.keys[blocks:],
            tuple(s for s in self.states if s.place > place),
        )  # fmt: skip

    def joined(self, after: Edge) -> Edge:
        """With the edge that goes on from its end, which has a page of its last block, too."""
        blocks = after.start // PAGE - self.start // PAGE
        return Edge(
            self.start, np.concatenate([self.tokens, after.tokens]),
            np.concatenate([self.pages[:blocks], after.pages]), self.keys + after.keys,
            self.states + after.states,
        )  # fmt: skip

    def with_state(self, state: State) -> Edge:
        """With a state that it has not."""
        states = sorted((*self.states, state), key=lambda each: each.place)
        return self._replace(states=tuple(states))

    def common(self, tokens: np.ndarray) -> int:
        """How many of its first tokens are the first of `tokens`, int32."""
        n = min(len(self.tokens), len(tokens))
        differ = self.tokens[:n] != tokens[:n]
        first = int(differ.argmax()) if n else 0
        return first if n and differ[first] else n

    def reached(self, tokens: Sequence[int], length: int, keys: Sequence[bytes]) -> int:
        """Up to which place it is what the first `length` of `tokens` are, told by their keys.

        Up to its first token they are what leads to it.
        """
        first, stop = self.start // PAGE, min(self.stop, length)
        blocks = stop // PAGE - first
        if blocks and self.keys[blocks - 1] != keys[first + blocks - 1]:
            blocks = bisect_left(range(blocks), True, key=lambda b: self.keys[b] != keys[first + b])
        at = max(self.start, (first + blocks) * PAGE)
        if at == stop:
            return at
        for known in self.tokens[at - self.start : at - self.start + PAGE].tolist():
            if at == stop or known != tokens[at]:
                break
            at += 1
        return at


NOTHING = Edge(0, np.zeros(0, np.int32), np.zeros(0, np.int32))
