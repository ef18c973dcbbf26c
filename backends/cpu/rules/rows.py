"""Lowering of ops/rows.py."""

from __future__ import annotations

from runtime.backends.cpu.rules.registry import lowers
from runtime.backends.cpu.tile.formats import READABLE
from runtime.backends.plan.lowering import Lowering
from runtime.ops.dtypes import BF16, F16, F32, I32, nbytes_for
from runtime.ops.tensor import Tensor


@lowers("get_rows")
def get_rows(lowering: Lowering, node: Tensor) -> None:
    """Rows dequantised from the mapped file; types without a kernel are widened at load."""
    matrix, ids = node.inputs
    direct = matrix.dtype.name in READABLE
    form, kind = ("raw", matrix.dtype.name) if direct else ("vector", "f32")
    n = int(matrix.shape[1])
    lowering.emit(
        "get_rows", node, {"format": kind}, matrix=lowering.weight(matrix, form),
        ids=lowering.read(ids), out=lowering.write(node), live=lowering.live(node), n=n,
        row_bytes=nbytes_for(matrix.dtype, (n,)) if direct else 4 * n, out_stride=n,
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
