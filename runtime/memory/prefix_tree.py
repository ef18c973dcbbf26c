"""A radix tree of token sequences: which pages hold their keys and values, and where states lie.

An edge holds what several sequences have in common, or what one of them has alone; it may begin
and end in the middle of a page. The page in which an edge ends is then held by the edges that go
on from there as well, by each its own copy or the same. An edge never changes: a change makes new
edges and puts them in place by one store, so that whatever breaks it off leaves a whole tree.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from runtime.ops import PAGE

KEY = 16  # bytes of a block's key


def block_keys(keys: list[bytes], root: bytes, tokens: Sequence[int], length: int) -> list[bytes]:
    """`keys` of the first blocks of `tokens`, with those of all whole blocks up to `length`.

    A key is a digest of all tokens up to the block's end and of `root`.
    """
    for block in range(len(keys), length // PAGE):
        parent = keys[-1] if keys else root
        ids = array("i", tokens[block * PAGE : (block + 1) * PAGE])
        keys.append(hashlib.blake2b(parent + ids.tobytes(), digest_size=KEY).digest())
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

    def before(self, place: int) -> Edge:
        """What of it lies before a place within it."""
        first = self.start // PAGE
        return Edge(
            self.start, self.tokens[: place - self.start], self.pages[: -(-place // PAGE) - first],
            self.keys[: place // PAGE - first], tuple(s for s in self.states if s.place <= place),
        )  # fmt: skip

    def behind(self, place: int) -> Edge:
        """What of it lies behind a place within it."""
        blocks = place // PAGE - self.start // PAGE
        return Edge(
            place, self.tokens[place - self.start :], self.pages[blocks:], self.keys[blocks:],
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


class Node:
    """An edge and what goes on from its end, by the next token. `used`: when it last was of use."""

    __slots__ = ("children", "edge", "used")

    def __init__(self, edge: Edge, used: int, children: dict[int, Node] | None = None) -> None:
        self.edge, self.used = edge, used
        self.children: dict[int, Node] = {} if children is None else children


class Step(NamedTuple):
    """A node on the way from the root, where it hangs, and up to which place it is on the way."""

    above: Node
    node: Node
    stop: int


def walk(root: Node, tokens: np.ndarray) -> list[Step]:
    """The way of `tokens`, int32, as far as the tree knows them."""
    way: list[Step] = []
    node, at = root, 0
    while at < len(tokens) and (child := node.children.get(int(tokens[at]))) is not None:
        at += _common(child.edge.tokens, tokens[at:])
        way.append(Step(node, child, at))
        if at < child.edge.stop:
            break
        node = child
    return way


def walk_known(
    root: Node, tokens: Sequence[int], length: int, keys: Sequence[bytes]
) -> list[Step]:  # fmt: skip
    """The same of the first `length` of `tokens`, whose blocks have these keys.

    It takes time for edges, not for tokens.
    """
    way: list[Step] = []
    node, at = root, 0
    while at < length and (child := node.children.get(tokens[at])) is not None:
        at = _reached(child.edge, tokens, length, keys)
        way.append(Step(node, child, at))
        if at < child.edge.stop:
            break
        node = child
    return way


def pages_of(way: Sequence[Step], length: int) -> np.ndarray:
    """int32 pages of the first `length` tokens of a way: of each block those of its last edge."""
    found = np.zeros(-(-length // PAGE), np.int32)
    for step in way:
        edge = step.node.edge
        if edge.start < length:
            first = edge.start // PAGE
            found[first : first + len(edge.pages)] = edge.pages[: len(found) - first]
    return found


def keys_of(way: Sequence[Step], length: int) -> list[bytes]:
    """The keys of its whole blocks up to `length`."""
    return [key for step in way for key in step.node.edge.keys][: length // PAGE]


def states_of(way: Sequence[Step], length: int) -> list[State]:
    """The states on a way up to `length`, in order."""
    reached = [(step, min(step.stop, length)) for step in way]
    return [s for step, stop in reached for s in step.node.edge.states if s.place <= stop]


def nodes(root: Node) -> Iterator[Step]:
    """Every node but the root, those above before those below."""
    left = [root]
    while left:
        above = left.pop()
        for node in above.children.values():
            yield Step(above, node, node.edge.stop)
            left.append(node)


def _common(known: np.ndarray, tokens: np.ndarray) -> int:
    """How many of the first tokens are the same."""
    n = min(len(known), len(tokens))
    differ = known[:n] != tokens[:n]
    first = int(differ.argmax()) if n else 0
    return first if n and differ[first] else n


def _reached(edge: Edge, tokens: Sequence[int], length: int, keys: Sequence[bytes]) -> int:
    """Up to which place an edge, whose first token is the next one, is on the way."""
    first, stop = edge.start // PAGE, min(edge.stop, length)
    blocks = stop // PAGE - first
    if blocks and edge.keys[blocks - 1] != keys[first + blocks - 1]:
        blocks = bisect_left(range(blocks), True, key=lambda b: edge.keys[b] != keys[first + b])
    at = max(edge.start, (first + blocks) * PAGE)
    for known in edge.tokens[at - edge.start : at - edge.start + PAGE].tolist():
        if at == stop or known != tokens[at]:
            break
        at += 1
    return at
