"""Fusions of feed-forward networks: norms and gates with packing, and the choice of experts."""

from __future__ import annotations

from runtime.backends.cpu.rewrite import PACKED, Options, node_of, only_user
from runtime.ops.dtypes import I32
from runtime.ops.graph import Graph, rewrite
from runtime.ops.tensor import Tensor


def fuse_packs(graph: Graph, options: Options) -> Graph:
    """pack(rms_norm(x)) and pack(silu(g) * u): the float result never goes to memory."""

    def swiglu(product: Tensor) -> tuple[Tensor, Tensor] | None:
        if product.op != "mul":
            return None
        first, second = product.inputs
        return (first.inputs[0], second) if first.op == "silu" else None

    def pack(node: Tensor, x: Tensor) -> Tensor:
        only = only_user(graph, node.inputs[0])
        if x.op == "rms_norm" and only:
            return node_of("rms_norm_pack", x.inputs, node, dtype=PACKED, **node.attrs, **x.attrs)
        gated = swiglu(x)
        if gated and only:
            return node_of("swiglu_pack", gated, node, dtype=PACKED, **node.attrs)
        return Tensor(node.op, (x,), node.shape, node.dtype, node.attrs, node.name)

    def pack_rows(node: Tensor, x: Tensor, tiles: Tensor) -> Tensor:
        gated = swiglu(x)
        if gated and only_user(graph, node.inputs[0]):
            return node_of("swiglu_pack_rows", (*gated, tiles), node, dtype=PACKED, **node.attrs)
        return Tensor(node.op, (x, tiles), node.shape, node.dtype, node.attrs, node.name)

    return rewrite(graph, {"pack": pack, "pack_rows": pack_rows})


def fuse_router(graph: Graph, options: Options) -> Graph:
    """softmax, top-k, take and normalise in one instruction with two results."""
    routers: dict[Tensor, Tensor] = {}

    def router(shares: Tensor, ids: Tensor, normalize: bool) -> Tensor:
        if ids not in routers:
            scores = shares.inputs[0]
            attrs = {"k": int(ids.shape[1]), "normalize": normalize}
            routers[ids] = node_of("router", (scores,), ids, scoring="softmax", **attrs)
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
        return node_of("router_ids", (made[node],), node, dtype=I32)

    made: dict[Tensor, Tensor] = {}
    return rewrite(graph, {"top_k": ids, "take": weights, "normalize": weights})
