"""What the tokens of a step decide: each number that chooses between kernels stands here.

    tokens                  products with one weight                   experts, recurrence
    1, 2, 4, 8              columns that share a reading (COLUMNS)     each choice by itself (FEW)
    up to 16                                                           one launch (DELTA_LAYER)
    up to 8 _MOST_TURNS     turns of 8 columns, or tiles: the quicker  tiles by expert
    more                    tiles of WIDTHS columns                    tiles by expert

A result's bits depend on none of them.
"""

from __future__ import annotations

from typing import Any

from runtime.backends.cuda.kernels.tile_ends import ROWS, WIDTHS
from runtime.backends.cuda.layouts import RARE
from runtime.ops.graph import Graph
from runtime.ops.matmul import matmul, matmul_id

COLUMNS = (1, 2, 4, 8)  # of a product that share the reading of a weight; more in turns
_RARE_COLUMNS = (1, 8)  # of formats that few files have
FEW = 8  # tokens of which each choice of an expert is a product of its own
DELTA_LAYER = 16  # tokens; beyond, a recurrence is faster with blocks of fewer columns
_PROCESSORS = 132
_COSTS = dict(zip(WIDTHS, (900, 1400), strict=True))  # cycles of a stage, about
_TURN, _MOST_TURNS = 4, 4  # cycles of as much in a matrix-vector product of 8 columns


def columns_of(tokens: int, format: str = "") -> int:
    """Columns of a product that share the reading of a weight, one of COLUMNS."""
    widths = _RARE_COLUMNS if format in RARE else COLUMNS
    return next((n for n in widths if tokens <= n), COLUMNS[-1])


def tile_width(columns: int, rows: int) -> int:
    """The width of tiles that keeps a large GPU busy for the shortest time.

    0: a few turns of 8 columns, which all of a GPU shares however few rows there are, take less.
    """
    across, turns = -(-rows // ROWS), -(-columns // 8)

    def cycles(width: int) -> int:
        return -(-across * -(-columns // width) // _PROCESSORS) * _COSTS[width]

    width = min(reversed(WIDTHS), key=cycles)
    few = turns == 1 or (turns <= _MOST_TURNS and across * turns * _TURN < cycles(width))
    return 0 if few else width


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
