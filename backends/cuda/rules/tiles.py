"""Products of many columns: tiles on tensor cores, and how wide they are."""

from __future__ import annotations

from typing import Any

from runtime.backends.cuda.kernels.tile import ROWS, WIDTHS
from runtime.backends.cuda.layouts import FEW, columns_of, cut
from runtime.backends.cuda.products import row_arguments
from runtime.backends.plan.lowering import Lowering
from runtime.ops.graph import Graph
from runtime.ops.matmul import matmul, matmul_id
from runtime.ops.tensor import Tensor

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


def emit_tile(
    lowering: Lowering, node: Tensor, format: str, width: int, rows: int, inner: int,
    columns: int, **arguments: Any,
) -> None:  # fmt: skip
    """A launch of `tile`; columns: how many tiles there are side by side."""
    row = row_arguments(format, inner)
    length = 2 * row.pop("pairs")
    given: dict[str, Any] = {
        "bias": 0, "residual": 0, "groups": 0, "order": 0, "live": 0, "residual_stride": 0,
        "out_stride": rows, "every": 1, "grouped": 0,
    }  # fmt: skip
    lowering.emit(
        "tile", node, {"format": format, "width": width}, rows=rows, blocks=cut(inner).blocks,
        length=length, **row, **given | arguments, grid=(-(-rows // ROWS), columns),
    )  # fmt: skip


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
