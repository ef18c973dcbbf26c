"""What a node of a step moves and computes, given what the step sees.

Counted is what is used: of an embedding the rows looked up, of experts as many as are chosen, of
a KV cache what attention sees, of recurrent state the slots read and written. What follows from
the kind of an op and from its `picks`, `reads` and `writes` is here; FLOPs stand with each op.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from runtime.ops.kv_formats import kv_format
from runtime.ops.registry import Kind, Op, find
from runtime.ops.tensor import LEAVES, Tensor


def page_nbytes(leaf: Tensor) -> int:
    """Bytes of one page of `leaf` [pages, PAGE, heads, dim] in planes, or of one slot as it is."""
    if leaf.base.attrs["storage"] == "slots":
        return leaf.nbytes // int(leaf.shape[0])
    _, tokens, heads, dim = map(int, leaf.shape)
    return tokens * heads * kv_format(leaf.dtype.name).token_nbytes(dim)


@dataclass(frozen=True)
class Seen:
    """What one step works on; whatever is left out counts at full capacity.

    live: how many there are of each Dim. lengths: tokens that each sequence has after the step.
    page_nbytes: bytes of one page or slot of a state leaf on the device in question.
    """

    live: Mapping[str, int] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()
    page_nbytes: Callable[[Tensor], float] = page_nbytes

    def count(self, x: Tensor) -> int:
        """Live rows of x, along its first axis."""
        return self._live(x.shape[0]) if x.shape else 1

    def size(self, x: Tensor) -> int:
        """Live elements of x."""
        return math.prod(map(self._live, x.shape))

    def nbytes(self, x: Tensor) -> float:
        """Bytes of the live elements of x."""
        return self.size(x) / x.dtype.block * x.dtype.nbytes

    def sequences(self, block_table: Tensor) -> int:
        """How many sequences a block table [sequences, pages] lists."""
        return len(self.lengths) or int(block_table.shape[0])

    def places(self, block_table: Tensor, pages: Tensor, window: int) -> int:
        """Places of `pages` that these sequences see together; window 0: all of each."""
        if self.lengths:
            return sum(min(n, window or n) for n in self.lengths)
        return block_table.size * int(pages.shape[1])

    def _live(self, n: int) -> int:
        return self.live.get(getattr(n, "name", ""), int(n))


@dataclass(frozen=True)
class Cost:
    """What is moved and computed: bytes read and written, FLOPs."""

    bytes: float
    flops: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


class Move(NamedTuple):
    """Bytes of a tensor that are read or written."""

    tensor: Tensor
    nbytes: float
    written: bool = False


def cost(node: Tensor, seen: Seen) -> Cost:
    """Bytes and FLOPs of a node; a leaf or a view costs nothing."""
    if node.op in LEAVES:
        return Cost(0, 0)
    return Cost(sum(move.nbytes for move in moves(node, seen)), flops(node, seen))


def flops(node: Tensor, seen: Seen) -> float:
    """FLOPs of a node that is no leaf."""
    op = find(node.op)
    if op.kind is Kind.VIEW:
        return 0
    return op.flops(node, seen) if callable(op.flops) else op.flops * seen.size(node)


def moves(node: Tensor, seen: Seen) -> Iterator[Move]:
    """What a node that is no leaf reads and writes; what lies in memory of its own is written."""
    op = find(node.op)
    if op.kind is Kind.VIEW:
        return
    for number, x in enumerate(node.inputs):
        if number in (*op.reads, *op.writes):
            yield from _state_moves(op, number, node, seen)
        elif number in op.picks:
            rows = int(x.shape[0]) or 1
            picked = seen.size(node.inputs[op.picks[number]])
            yield Move(x, x.nbytes * min(picked, rows) / rows)
        else:
            yield Move(x, seen.nbytes(x))
    if node.base is node:
        yield Move(node, seen.nbytes(node), True)


def _state_moves(op: Op, number: int, node: Tensor, seen: Seen) -> Iterator[Move]:
    """Slots count whole, one for each sequence; pages by their places."""
    leaf, where = node.inputs[number].base, node.inputs[op.picks[number]]
    each = seen.page_nbytes(leaf)
    slots = leaf.attrs["storage"] == "slots"
    if number in op.reads:
        window = node.attrs.get("window", 0)
        count = seen.count(where) if slots else seen.places(where, leaf, window)
        yield Move(leaf, each * count / (1 if slots else int(leaf.shape[1])))
    if number in op.writes:
        yield Move(leaf, each * seen.count(where) / (1 if slots else int(leaf.shape[1])), True)
