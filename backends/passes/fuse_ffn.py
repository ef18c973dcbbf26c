"""Fusions of feed-forward networks: norms and gates with packing, and the choice of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runtime.backends.passes.packing import PACKED, Options, node_of, only_user
from runtime.ops.dtypes import I32
from runtime.ops.graph import Graph, rewrite
from runtime.ops.tensor import Tensor


def fuse_packs(graph: Graph, options: Options) -> Graph:
    """pack(rms_norm(x)) and pack of a gated product: the float result never goes to memory."""

    def pack(node: Tensor, x: Tensor) -> Tensor:
        if x.op == "rms_norm" and _only_packed(graph, node.inputs[0]):
            return node_of("rms_norm_pack", x.inputs, node, dtype=PACKED, **node.attrs, **x.attrs)
        gated = _swiglu(x)
        if gated and only_user(graph, node.inputs[0]):
            inputs, attrs = gated
            return node_of("swiglu_pack", inputs, node, dtype=PACKED, **node.attrs, **attrs)
        return Tensor(node.op, (x,), node.shape, node.dtype, node.attrs, node.name)

    def pack_rows(node: Tensor, x: Tensor, tiles: Tensor) -> Tensor:
        gated = _swiglu(x)
        if gated and only_user(graph, node.inputs[0]):
            inputs, attrs = (*gated[0], tiles), {**node.attrs, **gated[1]}
            return node_of("swiglu_pack_rows", inputs, node, dtype=PACKED, **attrs)
        return Tensor(node.op, (x, tiles), node.shape, node.dtype, node.attrs, node.name)

    return rewrite(graph, {"pack": pack, "pack_rows": pack_rows})


def _only_packed(graph: Graph, x: Tensor) -> bool:
    """Whether nothing needs x itself, just its packed forms; each is then made from the source."""
    return x not in graph.outputs and all(user.op == "pack" for user in graph.users[x])


def _swiglu(product: Tensor) -> tuple[tuple[Tensor, Tensor], dict[str, Any]] | None:
    """Gate and up of silu(gate) * up, or of its clamped form with the numbers it takes."""
    first, second = product.inputs if len(product.inputs) == 2 else (product, product)
    if product.op == "mul" and first.op == "silu":
        return (first.inputs[0], second), {}
    if product.op == "swiglu_oai":
        return (first, second), dict(product.attrs)
    return None


@dataclass(frozen=True)
class _Choice:
    """How the experts of a `top_k` node get their weights; `end` is the node that gives them."""

    scores: Tensor
    scoring: str
    end: Tensor
    normalize: bool = False
    scale: float = 1.0


def fuse_router(graph: Graph, options: Options) -> Graph:
    """Scores to experts, their weights and (for one token) their tiles, in one call.

    Three ways: softmax or sigmoid of all scores, of which the chosen may be made to sum to 1; or
    the softmax of the chosen scores alone. A factor may follow.
    """
    choices = {node: _choice(graph, node) for node in graph.nodes if node.op == "top_k"}
    found = {ids: choice for ids, choice in choices.items() if choice}
    ends = {choice.end: ids for ids, choice in found.items()}
    made: dict[Tensor, Tensor] = {}

    def ids(node: Tensor, shares: Tensor) -> Tensor:
        if node not in found:
            return Tensor(node.op, (shares,), node.shape, node.dtype, node.attrs, node.name)
        choice = found[node]
        scores = shares if choice.scoring == "softmax_topk" else shares.inputs[0]
        made[node] = node_of(
            "router", (scores,), choice.end, scoring=choice.scoring, k=node.attrs["k"],
            normalize=choice.normalize, scale=choice.scale,
            tiles=any(map(_tile_each, graph.users[node])),
        )  # fmt: skip
        return node_of("router_ids", (made[node],), node, dtype=I32)

    def weights(node: Tensor, *new: Tensor) -> Tensor:
        if node in ends:
            return made[ends[node]]
        return Tensor(node.op, new, node.shape, node.dtype, node.attrs, node.name)

    def tiles(node: Tensor, ids: Tensor) -> Tensor:
        if node.inputs[0] in found and _tile_each(node):
            return node_of("router_tiles", ids.inputs, node, dtype=I32, **node.attrs)
        return Tensor(node.op, (ids,), node.shape, node.dtype, node.attrs, node.name)

    rules = dict.fromkeys(("take", "normalize", "scale", "softmax"), weights)
    return rewrite(graph, {"top_k": ids, "expert_tiles": tiles, **rules})


def _tile_each(tiles: Tensor) -> bool:
    """Whether every choice is a tile of its own, in the order of the choices.

    Of several tokens a sort by expert lets those of one expert share its weights.
    """
    one = tiles.op == "expert_tiles" and tiles.attrs["C"] == 1
    return one and int(tiles.inputs[0].shape[0]) == 1


def _choice(graph: Graph, ids: Tensor) -> _Choice | None:
    shares = ids.inputs[0]
    takes = [u for u in graph.users[ids] if u.op == "take" and u.inputs == (shares, ids)]
    if len(takes) != 1:
        return None
    if shares.op not in ("softmax", "sigmoid"):
        end = _next(graph, takes[0], "softmax")
        return _Choice(shares, "softmax_topk", end) if end else None
    normalized = _next(graph, takes[0], "normalize")
    end = normalized or takes[0]
    scaled = _next(graph, end, "scale")
    factor = scaled.attrs["factor"] if scaled else 1.0
    return _Choice(shares.inputs[0], shares.op, scaled or end, normalized is not None, factor)


def _next(graph: Graph, node: Tensor, op: str) -> Tensor | None:
    """The only user of a node, if it is an `op`."""
    user = graph.users[node][0] if only_user(graph, node) else None
    return user if user is not None and user.op == op else None
