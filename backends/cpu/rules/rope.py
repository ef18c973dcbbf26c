"""Lowering of ops/rope.py."""

from __future__ import annotations

from runtime.backends.cpu.rules.registry import lowers
from runtime.backends.cpu.sizes import float_bits
from runtime.backends.plan.lowering import Lowering
from runtime.ops.tensor import Tensor


@lowers("rope_angles")
def rope_angles(lowering: Lowering, node: Tensor) -> None:
    """cos and sin of this step's positions, once for all layers."""
    positions, inv_freq, *components = node.inputs
    width = int(positions.shape[1]) if components else 1
    lowering.emit(
        "rope_angles", node, positions=lowering.read(positions), width=width,
        components=lowering.read(components[0]) if components else 0,
        inv_freq=lowering.read(inv_freq), out=lowering.write(node), live=lowering.live(node),
        half=int(inv_freq.shape[0]), mscale=float_bits(node.attrs["magnitude"]),
    )  # fmt: skip


@lowers("rope")
def rope(lowering: Lowering, node: Tensor) -> None:
    """Rotation of [T, heads, dim]."""
    x, angles = node.inputs
    address, stride, head_stride = lowering.heads(x)
    lowering.emit(
        "rope", node, {"style": node.attrs["style"]}, x=address, angles=lowering.read(angles),
        out=lowering.write(node), live=lowering.live(x), n_heads=int(x.shape[1]),
        head_dim=int(x.shape[2]), half=int(angles.shape[1]), x_stride=stride,
        x_head_stride=head_stride, out_stride=int(x.shape[1] * x.shape[2]),
    )  # fmt: skip
