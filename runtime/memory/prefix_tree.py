"""PrefixTree: a radix tree of token sequences; who holds which pages and slots in it.

Nodes are put in place whole, each by one store, so that whatever breaks off a change leaves a
tree; what is counted beside it is counted anew after such a break.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from runtime.memory.prefix_edges import NOTHING, Edge, State
from runtime.ops import PAGE

LONG = 8192  # tokens of an edge, beyond which it is no longer copied to have more


class Node:
    """An edge and what goes on from its end, by the next token. `used`: when it last was of use."""

    __slots__ = ("children", "edge", "used")

    def __init__(self, edge: Edge, used: int, children: dict[int, Node] | None = None) -> None:
        self.edge, self.used = edge, used
        self.children: dict[int, Node] = {} if children is None else children

    def of(self, edge: Edge) -> Node:
        """The same with another edge that ends at its place."""
        return Node(edge, self.used, self.children)


class Step(NamedTuple):
    """A node on the way from the root, where it hangs, and up to which place it is on the way."""

    above: Node
    node: Node
    stop: int


class PrefixTree:
    """Sequences in a pool of so many pages."""

    def __init__(self, n_pages: int) -> None:
        self._n_pages = n_pages
        self.root = Node(NOTHING, 0)
        self._counts: np.ndarray | None = None
        self._slots: frozenset[int] | None = None

    def __iter__(self) -> Iterator[Step]:
        """Every node but the root, those above before those below."""
        left = [self.root]
        while left:
            above = left.pop()
            for node in above.children.values():
                yield Step(above, node, node.edge.stop)
                left.append(node)

    def walk(self, tokens: np.ndarray) -> list[Step]:
        """The way of `tokens`, int32, as far as the tree knows them."""
        way: list[Step] = []
        node, at = self.root, 0
        while at < len(tokens) and (child := node.children.get(int(tokens[at]))) is not None:
            at += child.edge.common(tokens[at:])
            way.append(Step(node, child, at))
            if at < child.edge.stop:
                break
            node = child
        return way

    def walk_known(self, tokens: Sequence[int], length: int, keys: Sequence[bytes]) -> list[Step]:
        """The same of the first `length` of `tokens`, whose blocks have these keys.

        It takes time for edges, not for tokens.
        """
        way: list[Step] = []
        node, at = self.root, 0
        while at < length and (child := node.children.get(tokens[at])) is not None:
            at = child.edge.reached(tokens, length, keys)
            way.append(Step(node, child, at))
            if at < child.edge.stop:
                break
            node = child
        return way

    @property
    def pages(self) -> np.ndarray:
        """Those that it holds, each once."""
        return np.flatnonzero(self.counts)

    @property
    def counts(self) -> np.ndarray:
        """int32 [pages of the pool]: how many edges hold each."""
        if self._counts is None:
            counts = np.zeros(self._n_pages, np.int32)
            for step in self:
                counts[step.node.edge.pages] += 1
            self._counts = counts
        return self._counts

    @property
    def slots(self) -> frozenset[int]:
        """Those that it holds."""
        if self._slots is None:
            self._slots = frozenset(s.slot for step in self for s in step.node.edge.states)
        return self._slots

    def put(
        self, above: Node, token: int, node: Node | None, gone: Sequence[Edge], come: Sequence[Edge]
    ) -> None:
        """Put a node in its place, or take away what is there; which edges go and come with it."""
        counts, self._counts = self._counts, None  # broken off in between, they are counted again
        if sum(len(edge.states) for edge in gone) != sum(len(edge.states) for edge in come):
            self._slots = None
        if node is None:
            del above.children[token]
        else:
            above.children[token] = node
        if counts is not None:
            for edge in gone:
                counts[edge.pages] -= 1
            for edge in come:
                counts[edge.pages] += 1
            self._counts = counts

    def change(self, step: Step, edge: Edge) -> None:
        """Another edge of the same tokens."""
        old = step.node.edge
        self.put(step.above, old.first, step.node.of(edge), (old,), (edge,))

    def grow(self, way: Sequence[Step], new: Edge, used: int) -> None:
        """An edge more, behind the end of a way."""
        leaf = Node(new, used)
        if not way:
            self.put(self.root, new.first, leaf, (), (new,))
            return
        above, node, at = way[-1]
        edge = node.edge
        if at < edge.stop:
            upper, lower = edge.before(at), edge.behind(at)
            fork = Node(upper, used, {lower.first: node.of(lower), new.first: leaf})
            self.put(above, edge.first, fork, (edge,), (upper, lower, new))
        elif node.children or len(edge.tokens) >= LONG:
            self.put(node, new.first, leaf, (), (new,))
        else:
            longer = edge.joined(new)
            self.put(above, edge.first, Node(longer, used), (edge,), (longer,))

    def shorten(self, above: Node, leaf: Node, place: int) -> Node | None:
        """Without what a leaf has behind a place; what is left of it."""
        edge = leaf.edge
        less = edge.before(place) if place > edge.start else None
        left = None if less is None else Node(less, leaf.used)
        self.put(above, edge.first, left, (edge,), () if less is None else (less,))
        return left

    def merge(self, above: Node, node: Node, child: Node) -> None:
        """Make one node of one that has an only child and that child."""
        edge = node.edge.joined(child.edge)
        joined = Node(edge, max(node.used, child.used), child.children)
        self.put(above, edge.first, joined, (node.edge, child.edge), (edge,))

    def compact(self) -> None:
        """Merge whatever no longer branches."""
        left = [self.root]
        while left:
            above = left.pop()
            for token, node in [*above.children.items()]:
                while len(node.children) == 1:
                    (child,) = node.children.values()
                    if len(node.edge.tokens) + len(child.edge.tokens) > LONG:
                        break
                    self.merge(above, node, child)
                    node = above.children[token]
                left.append(node)


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
