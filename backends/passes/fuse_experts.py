"""Fusions of the products of experts, for steps of few tokens: each choice is a product of its own.

Of a network of experts two products are left: gate and up, gated and packed, and the one that
follows, summed over the choices of a token with what is added to the sum.
"""

from __future__ import annotations

import math

from runtime.backends.passes.fuse_ffn import swiglu_pack
from runtime.backends.passes.packing import Options, linear, linear_id, node_of, only_user
from runtime.ops.graph import Graph, rewrite
from runtime.ops.moe import expert_sum
from runtime.ops.registry import Kind, fused
from runtime.ops.tensor import Tensor

linear_id_pair = fused(
    "linear_id_pair", kind=Kind.CONTRACTION, picks={1: 3, 4: 3, 5: 3, 6: 3},
    flops=lambda node, seen: 4 * seen.size(node) * int(node.inputs[1].shape[2]),
)  # tiles, gates of all experts, expert tiles, ids, ups, biases of both  # fmt: skip
linear_id_sum = fused(
    "linear_id_sum", kind=Kind.CONTRACTION, picks={1: 3},
    flops=lambda node, seen: 2 * seen.size(node.inputs[4]) * _matrix_size(node.inputs[1]),
)  # tiles, weights of all experts, expert tiles, ids, weights of ids, biases, terms  # fmt: skip


def _matrix_size(w: Tensor) -> int:
    return math.prod(map(int, w.shape[1:]))


def fuse_experts(graph: Graph, options: Options) -> Graph:
    """Two launches for the networks of the chosen experts, where a device wants that."""

    def pair(node: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        fits = all(only_user(graph, x) for x in node.inputs) and node.attrs["coding"] == "int8"
        if not (fits and _few(gate, options) and _few(up, options) and _alike(gate, up)):
            return node.with_(inputs=(gate, up))
        inputs = (*gate.inputs[:4], up.inputs[1], *gate.inputs[4:], *up.inputs[4:])
        return node_of(linear_id_pair, inputs, node, **node.attrs, every=gate.attrs["every"])

    def total(node: Tensor, y: Tensor, weights: Tensor, *rest: Tensor) -> Tensor:
        names = node.attrs.get("terms", ())
        own, terms = rest[: len(rest) - len(names)], rest[len(rest) - len(names) :]
        fits = _few(y, options) and only_user(graph, node.inputs[0]) and own in ((), y.inputs[3:4])
        if not fits:
            return node.with_(inputs=(y, weights, *rest))
        x, w, tiles, ids, *bias = y.inputs
        return node_of(
            linear_id_sum, (x, w, tiles, ids, weights, *bias, *terms), node, **node.attrs,
            bias=len(bias), every=y.attrs["every"],
        )  # fmt: skip

    if not options.few:
        return graph
    return _join_shared(rewrite(graph, {swiglu_pack: pair, expert_sum: total}))


def _join_shared(graph: Graph) -> Graph:
    """A shared expert as one more choice of every token, where its weights are as the others'.

    Its column stands behind those of the chosen; what opens it, one number a token, is computed
    with it.
    """

    def join(node: Tensor, *inputs: Tensor) -> Tensor:
        pair, w, _, ids, *_ = inputs
        first = 5 + node.attrs["bias"]
        names = node.attrs.get("terms", ())
        old = dict(zip(names, node.inputs[first:], strict=True))
        new = dict(zip(names, inputs[first:], strict=True))
        fits = "shared" in new and linear_id_pair.made(pair) and only_user(graph, node.inputs[0])
        network = _network(graph, old["shared"], new["shared"], pair, w) if fits else ()
        opening = _opening(graph, old["gate"], new["gate"]) if "gate" in new else ()
        if not network or (not opening and "gate" in new):
            return node.with_(inputs=inputs)
        *sides, down = network
        extra = {"shared": 1, "opened": int(bool(opening))}
        shape = (ids.shape[0], int(ids.shape[1]) + 1, pair.shape[-1])
        attrs = {**pair.attrs, **extra, "shape": shape}
        pair = node_of(linear_id_pair, (*pair.inputs, *sides, *opening), pair, **attrs)
        kept = {name: new[name] for name in names if name == "residual"}
        return node_of(
            linear_id_sum, (pair, *inputs[1:first], down, *opening, *kept.values()), node,
            **{**node.attrs, **extra, "terms": tuple(kept)},
        )  # fmt: skip

    return rewrite(graph, {linear_id_sum: join})


def _network(
    graph: Graph, old: Tensor, new: Tensor, pair: Tensor, w: Tensor
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gate, up and down of a shared expert that is as the chosen ones; () if it is not."""
    if not (linear.made(new) and swiglu_pack.made(new.inputs[0]) and len(new.inputs) == 2):
        return ()
    gated, was = new.inputs[0], old.inputs[0]
    sides = gated.inputs
    if not all(
        linear.made(s) and len(s.inputs) == 2 and s.inputs[0] is pair.inputs[0] for s in sides
    ):
        return ()
    found = (*(side.inputs[1] for side in sides), new.inputs[1])
    alike = zip(found, (pair.inputs[1], pair.inputs[1], w), strict=True)
    same = all((a.shape, a.dtype) == (b.shape[1:], b.dtype) for a, b in alike)
    plain = "alpha" not in gated.attrs and "alpha" not in pair.attrs
    alone = all(only_user(graph, x) for x in (old, was, *was.inputs))
    return found if same and plain and alone and pair.inputs[0].ndim == 2 else ()


def _opening(graph: Graph, old: Tensor, new: Tensor) -> tuple[Tensor, ...]:
    """What is multiplied to a number for each token, a float row and a weight; () if not that."""
    if not (linear.made(new) and len(new.inputs) == 2 and only_user(graph, old)):
        return ()
    x, w = new.inputs
    floats = x.attrs["coding"] == "f32" and x.ndim == 2 and int(w.shape[1]) % 8 == 0
    return (x, w) if floats and int(w.shape[0]) == 1 else ()


def _few(y: Tensor, options: Options) -> bool:
    few = linear_id.made(y) and int(y.inputs[3].shape[0]) <= options.few
    return few and y.inputs[0].attrs["coding"] == "int8"


def _alike(gate: Tensor, up: Tensor) -> bool:
    """Whether two products are of the same rows with weights of one kind."""
    x, w, *rest = gate.inputs
    other = up.inputs
    same = (x, *rest[:2], len(rest)) == (other[0], *other[2:4], len(other) - 2)
    return same and (w.shape, w.dtype) == (other[1].shape, other[1].dtype)
