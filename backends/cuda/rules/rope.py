"""Lowering of ops/rope.py."""

from __future__ import annotations

from runtime.backends.cuda.rules.registry import lowers
from runtime.backends.plan.lowering import Lowering
from runtime.ops.tensor import Tensor


@lowers("rope_angles")
def rope_angles(lowering: Lowering, node: Tensor) -> None:
    """cos and sin of this step's positions, once for all layers."""
    positions, inv_freq, *components = node.inputs
    half = int(inv_freq.shape[0])
    lowering.emit(
        "rope_angles", node, positions=lowering.read(positions),
        components=lowering.read(components[0]) if components else 0,
        width=int(positions.shape[1]) if components else 1,
        turns=lowering.weight(inv_freq, "turns"), out=lowering.write(node), half=half,
        magnitude=node.attrs["magnitude"], grid=(-(-half // 64), int(node.shape[0])),
    )  # fmt: skip


@lowers("rope")
def rope(lowering: Lowering, node: Tensor) -> None:
    """Rotation of [T, heads, dim]."""
    x, angles = node.inputs
    address, stride, head_stride = lowering.heads(x)
    tokens, heads, dim = map(int, x.shape)
    lowering.emit(
        "rope", node, {"style": node.attrs["style"]}, x=address, angles=lowering.read(angles),
        out=lowering.write(node), half=int(angles.shape[1]), dim=dim, x_stride=stride,
        x_head_stride=head_stride, out_stride=heads * dim, out_head_stride=dim,
        grid=(heads, tokens),
    )  # fmt: skip
