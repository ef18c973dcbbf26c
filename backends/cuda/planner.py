"""Plans of graphs for a GPU; made without a GPU, a driver or a compiler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from runtime.backends.cuda.layouts import FORMATS, packed_nbytes, packed_type
from runtime.backends.cuda.pages import page_nbytes
from runtime.backends.cuda.widths import DELTA_LAYER, FEW, product_kinds
from runtime.backends.passes.fuse_collectives import sums_by_library
from runtime.backends.passes.packing import Options
from runtime.backends.plan import planner
from runtime.backends.plan.lowering import Rules
from runtime.backends.plan.plan import Plan
from runtime.ops.blocks import BLOCK_FORMATS
from runtime.ops.graph import Graph
from runtime.ops.tensor import Tensor

MAX_HEAD_DIM = 256


def options(activations: str = "int8", fuse: bool = True) -> Options:
    """See `Options`; the width of tiles means nothing here.

    The blocks of a packed row lie in an order that depends on its length, so parts are not packed.
    """
    return Options(
        frozenset(FORMATS), MAX_HEAD_DIM, activations, fuse=fuse, pack_parts=False,
        delta_layer=DELTA_LAYER, few=FEW, attention_pack=True,
    )  # fmt: skip


class Planner(planner.Planner):
    """Plans for any GPU."""

    nccl_from: int | None = None  # bytes of the smallest sum over devices that is NCCL's
    readable = ("f32", "f16", "bf16", *BLOCK_FORMATS)

    def rules(self) -> Rules:
        """See plan/planner.py."""
        from runtime.backends.cuda.rules import RULES

        return RULES

    def plan(self, graph: Graph, guarded: bool = False) -> Plan:
        """See plan/planner.py."""
        if self.nccl_from is not None:
            graph = sums_by_library(graph, self.nccl_from)
        return super().plan(graph, guarded)

    def packed_nbytes(self, weight: Tensor) -> int:
        """See plan/planner.py."""
        *experts, rows, inner = map(int, weight.shape)
        return math.prod(experts) * packed_nbytes(packed_type(weight.dtype), rows, inner)

    def page_nbytes(self, leaf: Tensor) -> int:
        """Bytes of one page of all KV heads of a layer, or of one slot."""
        return page_nbytes(leaf)

    def distinct_sizes(self, graph: Graph, sizes: Sequence[int]) -> list[int]:
        """Of these numbers of tokens the first of each that takes other kernels."""
        first: dict[Any, int] = {}
        for size in sizes:
            first.setdefault(product_kinds(graph, size), size)
        return list(first.values())
