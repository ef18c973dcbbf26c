"""Lowering of ops/norm.py, and of norms fused with packing."""

from __future__ import annotations

from runtime.backends.cuda.rules.matmul import floats, packed
from runtime.backends.cuda.rules.registry import lowers
from runtime.backends.plan.lowering import Declined, Lowering
from runtime.ops.tensor import Tensor


@lowers("rms_norm")
def rms_norm(lowering: Lowering, node: Tensor) -> None:
    """One row per element of all axes but the last."""
    x, w = node.inputs
    address, n, _, stride = lowering.rows(x)
    if stride != n and x.size > n:
        raise Declined("not yet")
    lowering.emit(
        "rms_norm", node, {"packed": False}, x=address, w=lowering.weight(w, "vector"),
        out=lowering.write(node), pieces=n // 4, eps=node.attrs["eps"],
        grid=(x.size // n,),
    )  # fmt: skip


@lowers("rms_norm_pack")
def rms_norm_pack(lowering: Lowering, node: Tensor) -> None:
    """Norm of a row, then int8 for products; for float weights the norm alone."""
    x, w = node.inputs
    address, n, _, stride = lowering.rows(x)
    if stride != n and x.size > n:
        raise Declined("not yet")
    rows = x.size // n
    common = {
        "x": address, "w": lowering.weight(w, "vector"), "pieces": n // 4,
        "eps": node.attrs["eps"],
    }  # fmt: skip
    if node.attrs["coding"] == "f32":
        out = floats(lowering, node, rows, n)
        lowering.emit("rms_norm", node, {"packed": False}, out=out, grid=(rows,), **common)
        return
    how = packed(lowering, node, rows, n)
    lowering.emit("rms_norm", node, {"packed": True}, **how, grid=(rows,), **common)
