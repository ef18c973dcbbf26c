"""Fusions of feed-forward networks: norms and gates with packing, and the choice of experts."""

from __future__ import annotations

from typing import Any, NamedTuple

from runtime.backends.passes.packing import (
    Options,
    expert_tiles,
    node_of,
    only_user,
    pack,
    pack_rows,
)
from runtime.ops.dtypes import I32
from runtime.ops.elementwise import mul, scale, sigmoid, silu, swiglu_oai
from runtime.ops.graph import Graph, rewrite
from runtime.ops.moe import normalize, renumber, softmax, take, top_k
from runtime.ops.norm import rms_norm
from runtime.ops.registry import Kind, Op, fused
from runtime.ops.tensor import Tensor

rms_norm_pack = fused("rms_norm_pack", kind=Kind.ROWWISE)
swiglu_pack = fused("swiglu_pack", kind=Kind.ROWWISE)
swiglu_pack_rows = fused("swiglu_pack_rows", kind=Kind.GATHER, picks={0: 2, 1: 2})
router = fused("router", kind=Kind.ROWWISE)  # the weights; its other results are the next two
router_ids = fused("router_ids", kind=Kind.ROWWISE)
router_own = fused("router_own", kind=Kind.ROWWISE)  # the ids as a device numbers its own
router_tiles = fused("router_tiles", kind=Kind.WHOLE)


def fuse_packs(graph: Graph, options: Options) -> Graph:
    """pack(rms_norm(x)) and pack of a gated product: the float result never goes to memory."""

    def tiles(node: Tensor, x: Tensor) -> Tensor:
        if rms_norm.made(x) and _only_packed(graph, node.inputs[0]):
            return node_of(rms_norm_pack, x.inputs, node, **node.attrs, **x.attrs)
        gated = _swiglu(x)
        if gated and only_user(graph, node.inputs[0]):
            inputs, attrs = gated
            return node_of(swiglu_pack, inputs, node, **node.attrs, **attrs)
        return node.with_(inputs=(x,))

    def tiles_of_experts(node: Tensor, x: Tensor, experts: Tensor) -> Tensor:
        gated = _swiglu(x)
        if gated and only_user(graph, node.inputs[0]):
            inputs, attrs = (*gated[0], experts), {**node.attrs, **gated[1]}
            return node_of(swiglu_pack_rows, inputs, node, **attrs)
        return node.with_(inputs=(x, experts))

    return rewrite(graph, {pack: tiles, pack_rows: tiles_of_experts})


def _only_packed(graph: Graph, x: Tensor) -> bool:
    """Whether nothing needs x itself, just its packed forms; each is then made from the source."""
    return x not in graph.outputs and all(pack.made(user) for user in graph.users[x])


def _swiglu(product: Tensor) -> tuple[tuple[Tensor, Tensor], dict[str, Any]] | None:
    """Gate and up of silu(gate) * up, or of its clamped form with the numbers it takes."""
    first, second = product.inputs if len(product.inputs) == 2 else (product, product)
    if mul.made(product) and silu.made(first):
        return (first.inputs[0], second), {}
    if swiglu_oai.made(product):
        return (first, second), dict(product.attrs)
    return None


class _Choice(NamedTuple):
    """How the experts of a `top_k` node get their weights; `end` is the node that gives them."""

    scores: Tensor
    scoring: str
    end: Tensor
    normalize: bool = False
    scale: float = 1.0


def fuse_router(graph: Graph, options: Options) -> Graph:
    """Scores to experts, their weights and (for one token) their tiles, in one call.

    Three ways: softmax or sigmoid of all scores, of which the chosen may be made to sum to 1; or
    the softmax of the chosen scores alone. A factor may follow. A device that has some of the
    experts gets the chosen by its own numbers too.
    """
    choices = {node: _choice(graph, node) for node in graph.nodes if top_k.made(node)}
    found = {ids: choice for ids, choice in choices.items() if choice}
    ends = {choice.end: ids for ids, choice in found.items()}
    owns = {node.inputs[0]: node for node in graph.nodes if renumber.made(node)}
    tiled = {owns.get(ids, ids) for ids in found}
    made: dict[Tensor, Tensor] = {}

    def ids(node: Tensor, shares: Tensor) -> Tensor:
        if node not in found:
            return node.with_(inputs=(shares,))
        choice = found[node]
        scores = shares if choice.scoring == "softmax_topk" else shares.inputs[0]
        numbers = owns[node].inputs[1:] if node in owns else ()
        made[node] = node_of(
            router, (scores, *numbers), choice.end, scoring=choice.scoring, k=node.attrs["k"],
            normalize=choice.normalize, scale=choice.scale,
            tiles=any(map(_tile_each, graph.users[owns.get(node, node)])),
        )  # fmt: skip
        return node_of(router_ids, (made[node], scores), node, dtype=I32)

    def own(node: Tensor, ids: Tensor, numbers: Tensor) -> Tensor:
        if node in tiled:
            return node_of(router_own, (*ids.inputs, numbers), node)
        return node.with_(inputs=(ids, numbers))

    def weights(node: Tensor, *new: Tensor) -> Tensor:
        if node in ends:
            return made[ends[node]]
        return node.with_(inputs=new)

    def tiles(node: Tensor, ids: Tensor) -> Tensor:
        if node.inputs[0] in tiled and _tile_each(node):
            return node_of(router_tiles, ids.inputs, node, dtype=I32, **node.attrs)
        return node.with_(inputs=(ids,))

    rules = dict.fromkeys((take, normalize, scale, softmax), weights)
    return rewrite(graph, {top_k: ids, renumber: own, expert_tiles: tiles, **rules})


def _tile_each(tiles: Tensor) -> bool:
    """Whether every choice is a tile of its own, in the order of the choices.

    Of several tokens a sort by expert lets those of one expert share its weights.
    """
    one = expert_tiles.made(tiles) and tiles.attrs["C"] == 1
    return one and int(tiles.inputs[0].shape[0]) == 1


def _choice(graph: Graph, ids: Tensor) -> _Choice | None:
    shares = ids.inputs[0]
    takes = [u for u in graph.users[ids] if take.made(u) and u.inputs == (shares, ids)]
    if len(takes) != 1:
        return None
    if not softmax.made(shares) and not sigmoid.made(shares):
        end = _next(graph, takes[0], softmax)
        return _Choice(shares, "softmax_topk", end) if end else None
    normalized = _next(graph, takes[0], normalize)
    end = normalized or takes[0]
    scaled = _next(graph, end, scale)
    factor = scaled.attrs["factor"] if scaled else 1.0
    return _Choice(shares.inputs[0], shares.op, scaled or end, normalized is not None, factor)


def _next(graph: Graph, node: Tensor, op: Op) -> Tensor | None:
    """The only user of a node, if it is of `op`."""
    user = graph.users[node][0] if only_user(graph, node) else None
    return user if user is not None and op.made(user) else None
