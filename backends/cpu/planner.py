"""Plans of graphs for the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

from runtime.backends.cpu.abi import MAX_HEAD_DIM
from runtime.backends.cpu.tile.formats import (
    NAMES,
    READABLE,
    packed_nbytes,
    rows_from_tiles,
    tile_format,
)
from runtime.backends.passes.packing import Options, distinct_sizes
from runtime.backends.plan import planner
from runtime.backends.plan.lowering import Rules
from runtime.backends.plan.plan import Plan
from runtime.ops.cost import page_nbytes
from runtime.ops.graph import Graph
from runtime.ops.tensor import Tensor


def options(
    activations: str = "int8", wide: int = 8, fuse: bool = True, split: bool = False
) -> Options:
    """See `Options`; split where the instruction set is AMX."""
    return Options(frozenset(NAMES), MAX_HEAD_DIM, activations, wide, fuse, split)


def make_plan(graph: Graph, options: Options, guarded: bool = False) -> Plan:
    """The plan of a graph; `guarded` leaves room behind buffers, to see stray writes."""
    return Planner(options).plan(graph, guarded)


class Planner(planner.Planner):
    """Plans for one kind of CPU."""

    readable = READABLE

    def rules(self) -> Rules:
        """See plan/planner.py."""
        from runtime.backends.cpu.rules import RULES

        return RULES

    def packed_nbytes(self, weight: Tensor) -> int:
        """See plan/planner.py."""
        *experts, rows, inner = map(int, weight.shape)
        return math.prod(experts) * packed_nbytes(tile_format(weight.dtype), rows, inner)

    def rows_from_tiles(self, weight: Tensor) -> bool:
        """See plan/planner.py."""
        return rows_from_tiles(weight.dtype)

    def page_nbytes(self, leaf: Tensor) -> int:
        """Bytes of one page of all KV heads of a layer, or of one slot."""
        return page_nbytes(leaf)

    def distinct_sizes(self, graph: Graph, sizes: Sequence[int]) -> list[int]:
        """Of these numbers of tokens those whose plans use every kernel that any of them uses.

        graph: the step of one token of the model in question.
        """
        return distinct_sizes(graph, sizes, self.options)
