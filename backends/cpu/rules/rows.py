"""Lowering of ops/rows.py."""

from __future__ import annotations

from runtime.backends.cpu.rules.registry import lowers
from runtime.backends.cpu.tile.formats import READABLE, group_nbytes, rows_from_tiles, tile_format
from runtime.backends.plan.lowering import Lowering
from runtime.ops.dtypes import BF16, F16, F32, I32, nbytes_for
from runtime.ops.tensor import Tensor


@lowers("get_rows")
def get_rows(lowering: Lowering, node: Tensor) -> None:
    """Rows dequantised from the file's blocks; types without a kernel are widened at load.

    Of a matrix that is multiplied with as well (same content, same cut) they are read from the
    tiles, so that it is in memory once.
    """
    matrix, ids = node.inputs
    if matrix.content in lowering.multiplied and rows_from_tiles(matrix.dtype):
        _from_tiles(lowering, node)
        return
    direct = matrix.dtype.name in READABLE
    form, kind = ("raw", matrix.dtype.name) if direct else ("vector", "f32")
    n = int(matrix.shape[1])
    lowering.emit(
        "get_rows", node, {"format": kind}, matrix=lowering.weight(matrix, form),
        ids=lowering.read(ids), out=lowering.write(node), live=lowering.live(node), n=n,
        row_bytes=nbytes_for(matrix.dtype, (n,)) if direct else 4 * n, out_stride=n,
    )  # fmt: skip


def _from_tiles(lowering: Lowering, node: Tensor) -> None:
    (matrix, ids), n = node.inputs, int(node.shape[1])
    kind = tile_format(matrix.dtype)
    lowering.emit(
        "get_packed_rows", node, {"format": kind}, matrix=lowering.weight(matrix, "repacked"),
        ids=lowering.read(ids), out=lowering.write(node), live=lowering.live(node), n=n,
        group_bytes=group_nbytes(kind, n), out_stride=n,
    )  # fmt: skip


@lowers("copy")
def copy(lowering: Lowering, node: Tensor) -> None:
    """A view with up to four axes, of f32, i32, f16 or bf16."""
    (x,) = node.inputs
    lowering.emit(
        "copy", node, {"item": x.dtype.nbytes}, x=lowering.place(x, (F32, I32, F16, BF16)),
        out=lowering.write(node), live=lowering.live(x), **lowering.axes(x),
    )  # fmt: skip


@lowers("select_rows")
def select_rows(lowering: Lowering, node: Tensor) -> None:
    """The wanted rows copied together."""
    x, ids = node.inputs
    address, n, _, stride = lowering.tokens(x)
    lowering.emit(
        "gather_rows", node, x=address, ids=lowering.read(ids), out=lowering.write(node),
        live=lowering.live(node), n=n, x_stride=stride, out_stride=n,
    )  # fmt: skip
