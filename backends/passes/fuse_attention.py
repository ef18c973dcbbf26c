"""Fusions around attention: norm, rope and cache writes before it, the output gate behind it."""

from __future__ import annotations

from typing import NamedTuple

from runtime.backends.passes.packing import Options, node_of, only_user, pack
from runtime.ops.attention import attention, kv_write
from runtime.ops.elementwise import mul, sigmoid
from runtime.ops.graph import Graph, rewrite
from runtime.ops.norm import rms_norm
from runtime.ops.registry import Kind, Op, fused
from runtime.ops.rope import rope
from runtime.ops.rotation import hadamard
from runtime.ops.tensor import Tensor
from runtime.ops.views import reshape

qkv_post = fused("qkv_post", kind=Kind.STATEFUL, picks={3: 5, 4: 5}, writes=(3, 4))
sigmoid_gate_pack = fused("sigmoid_gate_pack", kind=Kind.ROWWISE)
attention_pack = fused(
    "attention_pack", kind=Kind.STATEFUL, picks={1: 3, 2: 3}, reads=(1, 2), flops=attention.flops
)  # inputs of attention, then perhaps (`gated`) the output gate


class _Head(NamedTuple):
    """A projection on its way to attention: perhaps norm, rope and rotation, then the cache."""

    source: Tensor
    norm: Tensor | None = None
    eps: float = 0.0
    angles: Tensor | None = None
    style: str = "none"
    rotation: int = 0


def _head(x: Tensor) -> _Head:
    angles, style, norm, eps = None, "none", None, 0.0
    x, rotation = _unrotated(x)
    if rope.made(x):
        x, angles, style = x.inputs[0], x.inputs[1], x.attrs["style"]
    if rms_norm.made(x):
        (x, norm), eps = x.inputs, x.attrs["eps"]
    return _Head(x, norm, eps, angles, style, rotation)


def _unrotated(x: Tensor) -> tuple[Tensor, int]:
    """What is rotated, and in which blocks; a tensor that is not: itself, 0."""
    return (x.inputs[0], x.attrs["block"]) if hadamard.made(x) else (x, 0)


def fuse_qkv(graph: Graph, options: Options) -> Graph:
    """Norm, rope and rotation of q and k, and both cache writes, in one instruction.

    Heads for which its kernel has no room are left to the plain ops.
    """

    def attend(node: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        plain = node.with_(inputs=(q, k, v, *rest))
        if not (kv_write.made(k) and kv_write.made(v)) or k.inputs[2] is not v.inputs[2]:
            return plain
        query, key = _head(q), _head(k.inputs[0])
        value, v_rotation = _unrotated(v.inputs[0])
        if query[2:] != key[2:] or k.inputs[0].shape[2] != v.inputs[0].shape[2]:
            return plain
        if k.inputs[0].shape[2] > options.max_head_dim:
            return plain
        if (query.norm is None) != (key.norm is None):
            return plain
        optional = {"angles": query.angles, "q_norm": query.norm, "k_norm": key.norm}
        present = {name: x for name, x in optional.items() if x is not None}
        inputs = (query.source, key.source, value, k.inputs[1], v.inputs[1], k.inputs[2])
        post = node_of(
            qkv_post, (*inputs, *present.values()), q, optional=tuple(present),
            style=query.style, eps=query.eps, k_type=k.dtype.name, v_type=v.dtype.name,
            k_rotation=key.rotation, v_rotation=v_rotation,
        )  # fmt: skip
        return node.with_(inputs=(post, k.inputs[1], v.inputs[1], *rest))

    return rewrite(graph, {attention: attend})


def fuse_rotation(graph: Graph, options: Options) -> Graph:
    """The result of attention rotated back, by attention itself."""

    def back(node: Tensor, y: Tensor) -> Tensor:
        if not attention.made(y) or not only_user(graph, node.inputs[0]):
            return node.with_(inputs=(y,))
        return node_of(attention, y.inputs, node, **y.attrs, rotation=node.attrs["block"])

    return rewrite(graph, {hadamard: back})


def gated_heads(graph: Graph, node: Tensor, x: Tensor, gate_op: Op) -> tuple[Tensor, Tensor] | None:
    """pack(merge_heads(mul(y, gate_op(gate)))) as (y, gate), [T, heads, d] each; or None.

    Heads must be whole units of packing, and y contiguous.
    """
    merged = node.inputs[0]
    if not reshape.made(x) or not mul.made(x.inputs[0]) or x.inputs[0].ndim != 3:
        return None
    if not only_user(graph, merged) or not only_user(graph, merged.inputs[0]):
        return None
    unit = 16 if node.attrs["coding"] == "f32" else 32
    for y, gate in (x.inputs[0].inputs, x.inputs[0].inputs[::-1]):
        if gate_op.made(gate) and gate.ndim == 3 and y.layout.is_contiguous(y.shape):
            opening = gate.inputs[0]
            fits = y.shape[2] % unit == 0 and x.ndim == 2 and opening.layout.strides[2] == 1
            return (y, opening) if fits else None
    return None


def fuse_gate(graph: Graph, options: Options) -> Graph:
    """The output gate of attention, sigmoid(gate) * y, straight into tiles."""

    def gate(node: Tensor, x: Tensor) -> Tensor:
        gated = gated_heads(graph, node, x, sigmoid)
        if gated is None:
            return node.with_(inputs=(x,))
        return node_of(sigmoid_gate_pack, gated, node, **node.attrs)

    return rewrite(graph, {pack: gate})


def fuse_attention_pack(graph: Graph, options: Options) -> Graph:
    """The output gate of attention and the packing of its heads by attention itself."""

    def join(node: Tensor, y: Tensor, *gate: Tensor) -> Tensor:
        heads, whole = node.inputs[0], y
        if not gate and reshape.made(y) and y.ndim == 2 and only_user(graph, heads):
            heads, whole = heads.inputs[0], y.inputs[0]
        fits = attention.made(whole) and whole.ndim == 3 and whole.shape[2] % 32 == 0
        alone = fits and only_user(graph, heads) and node.attrs["coding"] == "int8"
        if not options.attention_pack or not alone:
            return node.with_(inputs=(y, *gate))
        attrs = {**whole.attrs, **node.attrs, "gated": bool(gate)}
        return node_of(attention_pack, (*whole.inputs, *gate), node, **attrs)

    return rewrite(graph, {pack: join, sigmoid_gate_pack: join})
