"""Sums fused into the kernels before them: biases and residuals."""

from __future__ import annotations

from runtime.backends.passes.packing import Options, linear, linear_id, node_of, only_user
from runtime.ops.elementwise import add, row_scale, sigmoid
from runtime.ops.graph import Graph, rewrite
from runtime.ops.moe import expert_bias, expert_sum
from runtime.ops.tensor import Tensor


def fuse_sums(graph: Graph, options: Options) -> Graph:
    """Products with biases and residuals, and the sums over experts, in one call each."""

    def grow(node: Tensor, *new: Tensor) -> Tensor:
        for product, other in ((0, 1), (1, 0)):
            old, fused = node.inputs[product], new[product]
            if not only_user(graph, old) or new[other].shape == () or fused.attrs.get("residual"):
                continue
            vector = new[other].ndim == 1
            if linear.made(fused) and not (vector and fused.attrs.get("bias")):
                attrs = {**fused.attrs, "bias" if vector else "residual": True}
                return node_of(linear, (*fused.inputs, new[other]), node, **attrs)
            if expert_sum.made(fused) and not vector:
                grown = _one_more_term(node, fused, new[other])
                if grown is not None:
                    return grown
        return node.with_(inputs=new)

    def with_bias(node: Tensor, y: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
        old = node.inputs[0]
        fits = linear_id.made(y) and only_user(graph, old) and bias.op == "weight"
        if fits and len(y.inputs) == 4 and old.inputs[3] is node.inputs[2]:
            return node_of(linear_id, (*y.inputs, bias), node, **y.attrs)
        return node.with_(inputs=(y, bias, ids))

    return rewrite(graph, {add: grow, expert_bias: with_bias})


def _one_more_term(node: Tensor, total: Tensor, term: Tensor) -> Tensor | None:
    """An expert sum plus a shared expert or a residual, added in the order of the model.

    A shared expert may be scaled by the sigmoid of one number per token.
    """
    added: tuple[Tensor, ...]
    terms = total.attrs.get("terms", ())
    gated = row_scale.made(term) and sigmoid.made(term.inputs[1])
    if not terms and gated:
        x, opening = term.inputs
        added, terms = (x, opening.inputs[0]), ("shared", "gate")
    elif not terms or terms[-1] != "residual":
        added, terms = (term,), (*terms, "residual")
    elif terms == ("residual",):
        added, terms = (term,), ("shared", "residual")
    else:
        return None
    return node_of(expert_sum, (*total.inputs, *added), node, terms=terms)
