"""Lowering of ops/moe.py and of expert matmuls: tokens grouped by expert into tiles."""

from __future__ import annotations

from typing import Any

from runtime.backends.cpu.rules.matmul import activation, packed
from runtime.backends.cpu.rules.registry import lowers
from runtime.backends.cpu.sizes import float_bits
from runtime.backends.cpu.tile.formats import packed_nbytes, tile_format
from runtime.backends.plan.lowering import Lowering, Out
from runtime.backends.plan.plan import Buffer, Ref, Share
from runtime.ops.tensor import Tensor

HEADER = 64  # bytes before the tile records: the live tile count


def tile_capacity(choices: int, experts: int, width: int) -> int:
    """The most tiles that `choices` (token, rank) pairs over `experts` can fill."""
    return choices // width + min(experts, choices)


def _tiles(lowering: Lowering, tiles: Tensor) -> tuple[Ref, Ref, int]:
    """Records, live count and capacity of an expert_tiles or router_tiles node."""
    buffer, attrs = lowering.result(tiles), tiles.attrs
    capacity = tile_capacity(tiles.size, attrs["experts"], attrs["C"])
    return Ref(buffer, HEADER), Ref(buffer), capacity


@lowers("top_k")
def top_k(lowering: Lowering, node: Tensor) -> None:
    """Indices of the largest."""
    address, n, live, stride = lowering.rows(node.inputs[0])
    k = node.attrs["k"]
    lowering.emit(
        "top_k", node, x=address, out=lowering.write(node), live=live, n=n, k=k, x_stride=stride
    )


@lowers("take")
def take(lowering: Lowering, node: Tensor) -> None:
    """Scores of the chosen."""
    x, ids = node.inputs
    address, _, live, stride = lowering.rows(x)
    lowering.emit(
        "take", node, x=address, ids=lowering.read(ids), out=lowering.write(node), live=live,
        k=int(ids.shape[1]), x_stride=stride,
    )  # fmt: skip


@lowers("renumber")
def renumber(lowering: Lowering, node: Tensor) -> None:
    """Numbers of the chosen among a device's own."""
    ids, numbers = node.inputs
    lowering.emit(
        "renumber", node, ids=lowering.read(ids), numbers=lowering.read(numbers),
        out=lowering.write(node), live=lowering.live(node), k=int(ids.shape[1]),
    )  # fmt: skip


@lowers("router")
def router(lowering: Lowering, node: Tensor) -> None:
    """Scores to the chosen experts and their weights; ids and tiles are further results."""
    scores, *numbers = node.inputs
    address, n, live, stride = lowering.rows(scores)
    ids = Buffer("arena", f"{node.name}.ids", node.nbytes)
    tiles = Buffer("arena", f"{node.name}.tiles", HEADER + 8 * node.size)
    own = Buffer("arena", f"{node.name}.own", node.nbytes)
    records = Out(Ref(tiles, HEADER)) if node.attrs["tiles"] else 0
    constants = {"scoring": node.attrs["scoring"], "normalize": node.attrs["normalize"]}
    lowering.emit(
        "router", node, constants, logits=address, ids=Out(Ref(ids)), weights=lowering.write(node),
        tiles=records, n_tiles=Out(Ref(tiles)) if node.attrs["tiles"] else 0,
        numbers=lowering.read(numbers[0]) if numbers else 0, own=Out(Ref(own)) if numbers else 0,
        live=live,
        n_experts=n, k=node.attrs["k"], logits_stride=stride,
        scale=float_bits(node.attrs["scale"]),
    )  # fmt: skip
    lowering.router_results[node] = {"router_ids": ids, "router_own": own, "router_tiles": tiles}


@lowers("router_ids", "router_own", "router_tiles")
def router_result(lowering: Lowering, node: Tensor) -> None:
    """No call: the router wrote it."""
    lowering.alias(node, lowering.router_results[node.inputs[0]][node.op])


@lowers("expert_tiles")
def expert_tiles(lowering: Lowering, node: Tensor) -> None:
    """Records [expert, C output rows] of the tiles of this step."""
    (ids,) = node.inputs
    width, experts = node.attrs["C"], node.attrs["experts"]
    nbytes = HEADER + 4 * (1 + width) * tile_capacity(ids.size, experts, width)
    out = lowering.write(node, nbytes)
    scratch = 8 * (experts + 1)
    records = Out(Ref(out.ref.buffer, HEADER))
    lowering.emit(
        "expert_group", node, {"C": width}, ids=lowering.read(ids), tiles=records, n_tiles=out,
        live=lowering.live(ids), n_experts=experts, k=int(ids.shape[1]),
        scratch=Out(lowering.scratch(scratch)),
    )  # fmt: skip


@lowers("pack_rows")
def pack_rows(lowering: Lowering, node: Tensor) -> None:
    """Rows of x gathered into the tiles of their experts."""
    x, tiles = node.inputs
    address, n, _, stride = lowering.rows(x)
    records, count, capacity = _tiles(lowering, tiles)
    tile, out = packed(lowering, node, capacity * node.attrs["C"], n)
    lowering.emit(
        "pack_rows", node, tile, x=address, tiles=records, out=out, n_tiles=count, n=n,
        x_stride=stride, divisor=node.attrs["divisor"],
    )  # fmt: skip


@lowers("swiglu_pack_rows")
def swiglu_pack_rows(lowering: Lowering, node: Tensor) -> None:
    """silu(gate) * up of each (token, rank) gathered into the tiles of its expert."""
    gate, up, tiles = node.inputs
    address, n, _, gate_stride = lowering.rows(gate)
    up_address, _, _, up_stride = lowering.rows(up)
    records, count, capacity = _tiles(lowering, tiles)
    tile, out = packed(lowering, node, capacity * node.attrs["C"], n)
    act, bounds = activation(node)
    lowering.emit(
        "swiglu_pack_rows", node, tile | act, gate=address, up=up_address, tiles=records, out=out,
        n_tiles=count, n=n, gate_stride=gate_stride, up_stride=up_stride, **bounds,
    )  # fmt: skip


@lowers("linear_id")
def linear_id(lowering: Lowering, node: Tensor) -> None:
    """Each tile times the weights of its expert; choices that are in no tile cost nothing."""
    x, w, tiles, _, *bias = node.inputs
    records, count, _ = _tiles(lowering, tiles)
    rows, inner = int(w.shape[1]), int(w.shape[2])
    every = node.attrs["every"]
    constants = {
        "format": tile_format(w.dtype), "columns": x.attrs["C"], "coding": x.attrs["coding"]
    }  # fmt: skip
    lowering.emit(
        "matmul_id", node, constants, w=lowering.weight(w, "repacked"), x=Ref(lowering.result(x)),
        out=lowering.write(node), out_stride=rows,
        bias=lowering.weight(bias[0], "vector") if bias else 0, add=0, add_stride=0,
        live=lowering.live(node), n_rows=rows, n_inner=inner, tiles=records, n_tiles=count,
        expert_stride=packed_nbytes(tile_format(w.dtype), rows, inner), bias_stride=rows,
        every=every, share=Share(rows, ("out",)) if every else None,
    )  # fmt: skip


@lowers("expert_bias")
def expert_bias(lowering: Lowering, node: Tensor) -> None:
    """Rows of y, each plus the bias of its expert."""
    y, bias, ids = node.inputs
    address, n, live, stride = lowering.rows(y)
    lowering.emit(
        "expert_bias", node, y=address, bias=lowering.weight(bias, "vector"),
        ids=lowering.read(ids), out=lowering.write(node), live=live, n=n, y_stride=stride,
        out_stride=n,
    )  # fmt: skip


@lowers("expert_sum")
def expert_sum(lowering: Lowering, node: Tensor) -> None:
    """Weighted sum over ranks, plus a shared expert and a residual where there are."""
    y, weights, *rest = node.inputs
    names = node.attrs.get("terms", ())
    ids, n = rest[: len(rest) - len(names)], int(y.shape[2])
    terms = dict(zip(names, rest[len(ids) :], strict=True))
    places: dict[str, Any] = {}
    for name, term in (("shared", "shared"), ("gate", "gate"), ("add", "residual")):
        places[name], places[f"{name}_stride"] = 0, 0
        if term in terms:
            places[name], _, _, places[f"{name}_stride"] = lowering.rows(terms[term])
    lowering.emit(
        "expert_sum", node, y=lowering.read(y), weights=lowering.read(weights),
        ids=lowering.read(ids[0]) if ids else 0, out=lowering.write(node),
        live=lowering.live(node), n=n, k=int(y.shape[1]), out_stride=n, **places,
        share=Share(n, ("y", "shared", "add", "out")),
    )  # fmt: skip
