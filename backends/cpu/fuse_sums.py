"""Sums fused into the kernels before them: biases and residuals."""

from __future__ import annotations

from runtime.backends.cpu.rewrite import Options, node_of, only_user
from runtime.ops.graph import Graph, rewrite
from runtime.ops.tensor import Tensor


def fuse_sums(graph: Graph, options: Options) -> Graph:
    """linear + bias + residual and expert sum + residual in one instruction."""

    def add(node: Tensor, *new: Tensor) -> Tensor:
        for product, other in ((0, 1), (1, 0)):
            old, fused = node.inputs[product], new[product]
            if not only_user(graph, old) or new[other].shape == () or fused.attrs.get("add"):
                continue
            vector = new[other].ndim == 1
            if fused.op == "linear" and not (vector and fused.attrs.get("bias")):
                attrs = {**fused.attrs, "bias" if vector else "add": True}
                return node_of("linear", (*fused.inputs, new[other]), node, **attrs)
            if fused.op == "expert_sum" and not vector and len(fused.inputs) == 2:
                return node_of("expert_sum", (*fused.inputs, new[other]), node, add=True)
        return Tensor(node.op, new, node.shape, node.dtype, node.attrs, node.name)

    return rewrite(graph, {"add": add})
