"""Lowering of products of many columns: tiles on tensor cores."""

from __future__ import annotations

from typing import Any

from runtime.backends.cuda.kernels.tile_ends import ROWS
from runtime.backends.cuda.layouts import FLOATS, PIECE, UNIT, cut, float_lanes, parts
from runtime.backends.cuda.products import row_arguments
from runtime.backends.plan.lowering import Lowering
from runtime.ops.tensor import Tensor


def emit_tile(
    lowering: Lowering, node: Tensor, format: str, width: int, rows: int, inner: int,
    columns: int, **arguments: Any,
) -> None:  # fmt: skip
    """A launch of a tile; columns: how many there are side by side."""
    name, constants, row = _kernel_of(format, width, inner)
    given: dict[str, Any] = {
        "bias": 0, "residual": 0, "groups": 0, "order": 0, "live": 0, "residual_stride": 0,
        "out_stride": rows, "every": 1, "grouped": 0,
    }  # fmt: skip
    lowering.emit(
        name, node, constants, rows=rows, **row, **given | arguments,
        grid=(-(-rows // ROWS), columns),
    )  # fmt: skip


def _kernel_of(
    format: str, width: int, inner: int
) -> tuple[str, dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Name and constants of the kernel for a format, and its arguments for rows of `inner`."""
    units = -(-inner // UNIT)
    if format == "F32":
        return "tile_float", {"width": width}, {"units": units, "stretches": float_lanes(inner)}
    constants = {"format": format, "width": width}
    if format in FLOATS:
        pieces = parts(format, inner)[""] // PIECE
        return "tile_half", constants, {"row_pieces": pieces, "units": units}
    row = row_arguments(format, inner)
    row |= {"blocks": cut(inner).blocks, "length": 2 * row.pop("pairs")}
    del row["shift"]  # here no lanes share a row
    return "tile", constants, row
