"""Lowering of products of many columns: tiles on tensor cores."""

from __future__ import annotations

from typing import Any

from runtime.backends.cuda.kernels.tile import ROWS
from runtime.backends.cuda.layouts import cut
from runtime.backends.cuda.products import row_arguments
from runtime.backends.plan.lowering import Lowering
from runtime.ops.tensor import Tensor


def emit_tile(
    lowering: Lowering, node: Tensor, format: str, width: int, rows: int, inner: int,
    columns: int, **arguments: Any,
) -> None:  # fmt: skip
    """A launch of `tile`; columns: how many tiles there are side by side."""
    row: dict[str, Any] = row_arguments(format, inner)
    length = 2 * row.pop("pairs")
    given: dict[str, Any] = {
        "bias": 0, "residual": 0, "groups": 0, "order": 0, "live": 0, "residual_stride": 0,
        "out_stride": rows, "every": 1, "grouped": 0,
    }  # fmt: skip
    lowering.emit(
        "tile", node, {"format": format, "width": width}, rows=rows, blocks=cut(inner).blocks,
        length=length, **row, **given | arguments, grid=(-(-rows // ROWS), columns),
    )  # fmt: skip
