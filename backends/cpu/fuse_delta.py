"""Fusions of gated delta-net layers."""

from __future__ import annotations

from runtime.backends.cpu.fuse_attention import gated_heads
from runtime.backends.cpu.rewrite import PACKED, Options, node_of
from runtime.ops.graph import Graph, rewrite
from runtime.ops.tensor import Tensor


def fuse_gated_norm(graph: Graph, options: Options) -> Graph:
    """The gated norm of each head, rms_norm(y, w) * silu(gate), straight into tiles."""

    def pack(node: Tensor, x: Tensor) -> Tensor:
        gated = gated_heads(graph, node, x, "silu")
        if gated is None or gated[0].op != "rms_norm":
            return Tensor(node.op, (x,), node.shape, node.dtype, node.attrs, node.name)
        norm, gate = gated
        (y, w), eps = norm.inputs, norm.attrs["eps"]
        if not y.layout.is_contiguous(y.shape):
            return Tensor(node.op, (x,), node.shape, node.dtype, node.attrs, node.name)
        return node_of("gated_norm_pack", (y, w, gate), node, dtype=PACKED, eps=eps, **node.attrs)

    return rewrite(graph, {"pack": pack})
