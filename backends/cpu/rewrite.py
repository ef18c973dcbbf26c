"""From a model's graph to the CPU's: activations packed once per input, and ops fused.

Each pass is a table of rules for `ops.rewrite`. The new nodes (`pack`, `linear`, `qkv_post`, ...)
live only between here and the lowering; model files and split rules never see them. Every fused
op computes what the plain ops do; tests compare the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from runtime.backends.cpu.tile.formats import NAMES as FORMATS
from runtime.ops.dtypes import F32, I32, DType
from runtime.ops.graph import Graph, rewrite
from runtime.ops.passes import select_early
from runtime.ops.tensor import Tensor

FLOAT_FORMATS = ("F32", "F16", "BF16")
PACKED = DType("packed", 1, 1, None)


@dataclass(frozen=True)
class Options:
    """How to lower: `activations` "int8" or "f32"; `wide` = columns of the widest tile.

    split: BF16 weights take activations in bfloat16 pieces (the instruction set is AMX).
    """

    activations: str = "int8"
    wide: int = 8
    fuse: bool = True
    split: bool = False


def prepare(graph: Graph, options: Options) -> Graph:
    """All passes in order."""
    if options.fuse:
        graph = select_early(graph)
    for each in _PASSES if options.fuse else (_pack_inputs,):
        graph = each(graph, options)
    return graph


def tile_format(dtype: DType) -> str:
    """The packed format of a weight type; one without a tile is widened when it is loaded."""
    return dtype.name.upper() if dtype.name.upper() in FORMATS else "F32"


def activation_kind(w: Tensor, options: Options) -> str:
    """What a weight is multiplied with: int8 blocks, or float32 (whole or split) for floats."""
    if options.split and w.dtype.name.upper() == "BF16" and w.shape[-1] % 32 == 0:
        return "split"
    exact = tile_format(w.dtype) in FLOAT_FORMATS or options.activations == "f32"
    return "f32" if exact else "int8"


def columns(rows: int, kind: str, options: Options) -> int:
    """Columns of the tiles for a capacity of `rows`; a result's bits never depend on it."""
    if rows <= 4:
        return 1 if rows == 1 else 4
    return options.wide if rows >= 16 and kind != "f32" else 8


def expert_columns(choices: int, experts: int, kind: str, options: Options) -> int:
    """Columns of expert tiles: as many as an expert gets on average, so that few are empty."""
    return 1 if choices < 2 * experts else columns(choices // experts, kind, options)


def _node(op: str, inputs: tuple[Tensor, ...], like: Tensor, **attrs: Any) -> Tensor:
    shape, dtype = attrs.pop("shape", like.shape), attrs.pop("dtype", F32)
    return Tensor(op, inputs, shape, dtype, MappingProxyType(attrs), like.name)


def _only_user(graph: Graph, node: Tensor) -> bool:
    return len(graph.users[node]) == 1 and node not in graph.outputs


def _pack_inputs(graph: Graph, options: Options) -> Graph:
    """matmul(x, w) -> linear(pack(x), w); equal packs of one x are one node."""
    made: dict[tuple[Any, ...], Tensor] = {}

    def pack(op: str, inputs: tuple[Tensor, ...], like: Tensor, **attrs: Any) -> Tensor:
        key = (op, inputs, *sorted(attrs.items()))
        if key not in made:
            made[key] = _node(op, inputs, like, dtype=PACKED, shape=like.shape, **attrs)
        return made[key]

    def matmul(node: Tensor, x: Tensor, w: Tensor) -> Tensor:
        kind = activation_kind(w, options)
        width = columns(x.size // x.shape[-1], kind, options)
        packed = pack("pack", (x,), x, C=width, kind=kind)
        return _node("linear", (packed, w), node)

    def matmul_id(node: Tensor, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        kind = activation_kind(w, options)
        width = expert_columns(ids.size, int(w.shape[0]), kind, options)
        key = ("tiles", ids, width)
        if key not in made:
            made[key] = _node(
                "expert_tiles", (ids,), ids, dtype=I32, C=width, experts=int(w.shape[0])
            )
        divisor = int(ids.shape[1]) if x.ndim == 2 else 1
        packed = pack("pack_rows", (x, made[key]), x, C=width, kind=kind, divisor=divisor)
        return _node("linear_id", (packed, w, made[key]), node)

    return rewrite(graph, {"matmul": matmul, "matmul_id": matmul_id})


def _fuse_sums(graph: Graph, options: Options) -> Graph:
    """linear + bias + residual and expert sum + residual in one instruction."""

    def add(node: Tensor, *new: Tensor) -> Tensor:
        for product, other in ((0, 1), (1, 0)):
            old, fused = node.inputs[product], new[product]
            if not _only_user(graph, old) or new[other].shape == () or fused.attrs.get("add"):
                continue
            vector = new[other].ndim == 1
            if fused.op == "linear" and not (vector and fused.attrs.get("bias")):
                attrs = {**fused.attrs, "bias" if vector else "add": True}
                return _node("linear", (*fused.inputs, new[other]), node, **attrs)
            if fused.op == "expert_sum" and not vector and len(fused.inputs) == 2:
                return _node("expert_sum", (*fused.inputs, new[other]), node, add=True)
        return Tensor(node.op, new, node.shape, node.dtype, node.attrs, node.name)

    return rewrite(graph, {"add": add})


def _fuse_packs(graph: Graph, options: Options) -> Graph:
    """pack(rms_norm(x)) and pack(silu(g) * u): the float result never goes to memory."""

    def swiglu(product: Tensor) -> tuple[Tensor, Tensor] | None:
        if product.op != "mul":
            return None
        first, second = product.inputs
        return (first.inputs[0], second) if first.op == "silu" else None

    def pack(node: Tensor, x: Tensor) -> Tensor:
        only = _only_user(graph, node.inputs[0])
        if x.op == "rms_norm" and only:
            return _node("rms_norm_pack", x.inputs, node, dtype=PACKED, **node.attrs, **x.attrs)
        gated = swiglu(x)
        if gated and only:
            return _node("swiglu_pack", gated, node, dtype=PACKED, **node.attrs)
        return Tensor(node.op, (x,), node.shape, node.dtype, node.attrs, node.name)

    def pack_rows(node: Tensor, x: Tensor, tiles: Tensor) -> Tensor:
        gated = swiglu(x)
        if gated and _only_user(graph, node.inputs[0]):
            return _node("swiglu_pack_rows", (*gated, tiles), node, dtype=PACKED, **node.attrs)
        return Tensor(node.op, (x, tiles), node.shape, node.dtype, node.attrs, node.name)

    return rewrite(graph, {"pack": pack, "pack_rows": pack_rows})


@dataclass(frozen=True)
class _Head:
    """A projection on its way to attention: optional norm, optional rope, then the cache."""

    source: Tensor
    norm: Tensor | None = None
    eps: float = 0.0
    angles: Tensor | None = None
    style: str = "none"


def _head(x: Tensor) -> _Head:
    angles, style, norm, eps = None, "none", None, 0.0
    if x.op == "rope":
        x, angles, style = x.inputs[0], x.inputs[1], x.attrs["style"]
    if x.op == "rms_norm":
        (x, norm), eps = x.inputs, x.attrs["eps"]
    return _Head(x, norm, eps, angles, style)


def _fuse_qkv(graph: Graph, options: Options) -> Graph:
    """Norm and rope of q and k, and both cache writes, in one instruction before attention."""

    def attention(node: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        plain = Tensor(node.op, (q, k, v, *rest), node.shape, node.dtype, node.attrs, node.name)
        if k.op != "kv_write" or v.op != "kv_write" or k.inputs[2] is not v.inputs[2]:
            return plain
        query, key = _head(q), _head(k.inputs[0])
        same = (query.angles, query.style, query.eps) == (key.angles, key.style, key.eps)
        if not same or k.inputs[0].shape[2] != v.inputs[0].shape[2]:
            return plain
        if (query.norm is None) != (key.norm is None):
            return plain
        optional = {"angles": query.angles, "q_norm": query.norm, "k_norm": key.norm}
        present = {name: x for name, x in optional.items() if x is not None}
        inputs = (query.source, key.source, v.inputs[0], k.inputs[1], v.inputs[1], k.inputs[2])
        post = _node(
            "qkv_post", (*inputs, *present.values()), q, optional=tuple(present),
            style=query.style, eps=query.eps, k_type=k.dtype.name, v_type=v.dtype.name,
        )  # fmt: skip
        return Tensor(
            "attention", (post, k.inputs[1], v.inputs[1], *rest), node.shape, node.dtype,
            node.attrs, node.name,
        )  # fmt: skip

    return rewrite(graph, {"attention": attention})


def _fuse_router(graph: Graph, options: Options) -> Graph:
    """softmax, top-k, take and normalise in one instruction with two results."""
    routers: dict[Tensor, Tensor] = {}

    def router(shares: Tensor, ids: Tensor, normalize: bool) -> Tensor:
        if ids not in routers:
            scores = shares.inputs[0]
            attrs = {"k": int(ids.shape[1]), "normalize": normalize}
            routers[ids] = _node("router", (scores,), ids, scoring="softmax", **attrs)
        return routers[ids]

    def chosen(ids: Tensor, shares: Tensor) -> bool:
        return ids.op == "top_k" and ids.inputs[0] is shares and shares.op == "softmax"

    found: dict[Tensor, Tensor] = {}  # top_k -> the router that replaces it
    for node in graph.nodes:
        take = node.inputs[0] if node.op == "normalize" else node
        if take.op == "take" and chosen(take.inputs[1], take.inputs[0]):
            alone = node.op == "take" and any(u.op == "normalize" for u in graph.users[node])
            if not alone:
                found[take.inputs[1]] = node

    def weights(node: Tensor, *new: Tensor) -> Tensor:
        take = node.inputs[0] if node.op == "normalize" else node
        old_ids = take.inputs[1] if take.op == "take" else None
        if old_ids is None or found.get(old_ids) is not node:
            return Tensor(node.op, new, node.shape, node.dtype, node.attrs, node.name)
        return made[old_ids]

    def ids(node: Tensor, shares: Tensor) -> Tensor:
        if node not in found:
            return Tensor(node.op, (shares,), node.shape, node.dtype, node.attrs, node.name)
        made[node] = router(shares, node, found[node].op == "normalize")
        return _node("router_ids", (made[node],), node, dtype=I32)

    made: dict[Tensor, Tensor] = {}
    return rewrite(graph, {"top_k": ids, "take": weights, "normalize": weights})


_PASSES = (_pack_inputs, _fuse_sums, _fuse_packs, _fuse_qkv, _fuse_router)
