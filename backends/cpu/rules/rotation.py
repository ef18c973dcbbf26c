"""Lowering of ops/rotation.py."""

from __future__ import annotations

from runtime.backends.cpu.rules.registry import lowers
from runtime.backends.plan.lowering import Lowering
from runtime.ops.tensor import Tensor


@lowers("hadamard")
def hadamard(lowering: Lowering, node: Tensor) -> None:
    """Heads of [T, heads, dim], which may lie apart."""
    (x,) = node.inputs
    address, stride, head_stride = lowering.heads(x)
    lowering.emit(
        "hadamard", node, x=address, out=lowering.write(node), live=lowering.live(x),
        n_heads=int(x.shape[1]), head_dim=int(x.shape[2]), x_stride=stride,
        x_head_stride=head_stride, block=node.attrs["block"],
    )  # fmt: skip
