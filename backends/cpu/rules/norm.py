"""Lowering of ops/norm.py, and of norms fused with packing."""

from __future__ import annotations

from runtime.backends.cpu.rules.matmul import packed
from runtime.backends.cpu.rules.registry import lowers
from runtime.backends.cpu.sizes import float_bits
from runtime.backends.plan.lowering import Lowering
from runtime.ops.tensor import Tensor


@lowers("rms_norm")
def rms_norm(lowering: Lowering, node: Tensor) -> None:
    """One row per element of all axes but the last."""
    x, w = node.inputs
    address, n, live, stride = lowering.rows(x)
    lowering.emit(
        "rms_norm", node, x=address, w=lowering.weight(w, "vector"), out=lowering.write(node),
        live=live, n=n, x_stride=stride, out_stride=n, eps=float_bits(node.attrs["eps"]),
    )  # fmt: skip


@lowers("rms_norm_pack")
def rms_norm_pack(lowering: Lowering, node: Tensor) -> None:
    """Norm of a row, then its tiles for matmuls."""
    x, w = node.inputs
    address, n, live, stride = lowering.rows(x)
    tile, out = packed(lowering, node, x.size // n, n)
    lowering.emit(
        "rms_norm_pack", node, tile, x=address, w=lowering.weight(w, "vector"), out=out, live=live,
        n=n, x_stride=stride, eps=float_bits(node.attrs["eps"]),
    )  # fmt: skip
