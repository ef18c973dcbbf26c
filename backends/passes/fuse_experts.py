"""Fusions of the products of experts, for steps of few tokens: each choice is a product of its own.

Of a network of experts two products are left: gate and up, gated and packed, and the one that
follows, summed over the choices of a token with what is added to the sum.
"""

from __future__ import annotations

import math

from runtime.backends.passes.fuse_ffn import swiglu_pack
from runtime.backends.passes.packing import Options, linear_id, node_of, only_user
from runtime.ops.graph import Graph, rewrite
from runtime.ops.matmul import matmul_id
from runtime.ops.moe import expert_sum
from runtime.ops.registry import Kind, fused
from runtime.ops.tensor import Tensor

linear_id_pair = fused(
    "linear_id_pair", kind=Kind.CONTRACTION, picks={1: 3, 4: 3, 5: 3, 6: 3},
    flops=lambda node, seen: 2 * matmul_id.flops(node, seen),
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

    return rewrite(graph, {swiglu_pack: pair, expert_sum: total}) if options.few else graph


def _few(y: Tensor, options: Options) -> bool:
    few = linear_id.made(y) and int(y.inputs[3].shape[0]) <= options.few
    return few and y.inputs[0].attrs["coding"] == "int8"


def _alike(gate: Tensor, up: Tensor) -> bool:
    """Whether two products are of the same rows with weights of one kind."""
    x, w, *rest = gate.inputs
    other = up.inputs
    same = (x, *rest[:2], len(rest)) == (other[0], *other[2:4], len(other) - 2)
    return same and (w.shape, w.dtype) == (other[1].shape, other[1].dtype)
