"""How wide tiles of many columns are, and up to how many tokens experts are taken one by one."""

from __future__ import annotations

from typing import Any

from runtime.backends.cuda.kernels.tile import ROWS, WIDTHS
from runtime.backends.cuda.layouts import columns_of
from runtime.ops.graph import Graph
from runtime.ops.matmul import matmul, matmul_id

FEW = 8  # tokens of which each choice of an expert is a product of its own
_PROCESSORS = 132
_COSTS = dict(zip(WIDTHS, (7, 12), strict=True))  # instructions of a stage, about


def tile_width(columns: int, rows: int) -> int:
    """The width of tiles that keeps a large GPU busy for the shortest time."""

    def turns(width: int) -> int:
        tiles = -(-columns // width) * -(-rows // ROWS)
        return -(-tiles // _PROCESSORS) * _COSTS[width]

    return min(reversed(WIDTHS), key=turns)


def group_width(choices: int, experts: int) -> int:
    """The width of tiles for choices of experts: each expert has its own, the last not full."""
    there = max(1, min(choices, experts))

    def work(width: int) -> float:
        return max(there, choices / width + there / 2) * _COSTS[width]

    return min(reversed(WIDTHS), key=work)


def product_kinds(graph: Graph, tokens: int) -> tuple[Any, ...]:
    """What kernels the products of a model take for so many tokens, of the graph for one."""
    kinds: set[Any] = {columns_of(tokens)}
    if tokens > FEW:
        for node in graph.nodes:
            if matmul.made(node):
                kinds.add(
                    tile_width(tokens * node.size // int(node.shape[-1]), int(node.shape[-1]))
                )
            if matmul_id.made(node):
                _, w, ids = node.inputs
                kinds.add((group_width(tokens * ids.size, int(w.shape[0])),))
    return tuple(sorted(kinds, key=str))
