"""Lowering of ops/rotation.py."""

from __future__ import annotations

from runtime.backends.cuda.kernels.rotation import MAX_GROUPS, WARPS
from runtime.backends.cuda.rules.registry import lowers
from runtime.backends.plan.lowering import Declined, Lowering
from runtime.ops.tensor import Tensor


@lowers("hadamard")
def hadamard(lowering: Lowering, node: Tensor) -> None:
    """Heads of [T, heads, dim], which may lie apart."""
    (x,) = node.inputs
    address, stride, head_stride = lowering.heads(x)
    tokens, heads, dim = map(int, x.shape)
    if dim > 32 * MAX_GROUPS:
        raise Declined(f"heads of {dim} dims: {32 * MAX_GROUPS} are the most")
    lowering.emit(
        "hadamard", node, x=address, out=lowering.write(node), heads=heads, dim=dim,
        x_stride=stride, x_head_stride=head_stride, block=node.attrs["block"],
        grid=(-(-heads // WARPS), tokens),
    )  # fmt: skip
