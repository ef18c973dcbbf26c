"""Lowering of products with experts: choice by choice for few tokens, else in tiles by expert."""

from __future__ import annotations

from typing import Any

from runtime.backends.cuda.kernels.experts import INNER
from runtime.backends.cuda.kernels.experts_group import groups_of
from runtime.backends.cuda.kernels.experts_rows import WARPS, rows_at_once
from runtime.backends.cuda.layouts import FLOATS, UNIT, cut, float_lanes, packed_type
from runtime.backends.cuda.products import float_arguments, half_rows, row_arguments
from runtime.backends.cuda.rules.matmul import packed, weight_form
from runtime.backends.cuda.rules.norm_tail import NONE
from runtime.backends.cuda.rules.registry import lowers
from runtime.backends.cuda.rules.tiles import emit_tile
from runtime.backends.cuda.widths import FEW, group_width
from runtime.backends.plan.lowering import Lowering, Out
from runtime.backends.plan.plan import Ref
from runtime.ops.tensor import Tensor


def groups(tiles: Tensor) -> tuple[int, int, int]:
    """Width of the tiles of an expert_tiles node, how many there may be, and bytes before them."""
    choices, experts = tiles.inputs[0].size, tiles.attrs["experts"]
    width = group_width(choices, experts)
    return width, groups_of(choices, experts, width), -(-4 * choices // 16) * 16


@lowers("expert_tiles")
def expert_tiles(lowering: Lowering, node: Tensor) -> None:
    """Choices by expert; of few tokens each is by itself, and nothing has to be known."""
    (ids,) = node.inputs
    if int(ids.shape[0]) <= FEW:
        lowering.alias(node, lowering.read(ids).buffer)
        return
    width, capacity, first = groups(node)
    order = lowering.write(node, first + 16 * capacity)
    lowering.emit(
        "expert_group", node, ids=lowering.read(ids), live=lowering.live(ids), order=order,
        groups=Out(Ref(order.ref.buffer, first)), k=int(ids.shape[1]), width=width,
        experts=node.attrs["experts"], capacity=capacity, grid=(node.attrs["experts"],),
    )  # fmt: skip


@lowers("linear_id")
def linear_id(lowering: Lowering, node: Tensor) -> None:
    """Each choice's column times the weights of its expert; what is not here is not written."""
    x, w, tiles, ids, *bias = node.inputs
    rows, inner, (format, form) = int(w.shape[1]), int(w.shape[2]), weight_form(x, w)
    common: dict[str, Any] = {
        "x": Ref(lowering.result(x)), "out": lowering.write(node), "every": node.attrs["every"],
        "bias": lowering.weight(bias[0], "vector") if bias else 0, "has_bias": len(bias),
        "weights": lowering.weight(w, form),
    }  # fmt: skip
    few = int(ids.shape[0]) <= FEW  # then each choice is as if it were a token
    if few and format in FLOATS:
        _few_floats(lowering, node, format, rows, inner, ids, common)
        return
    if few:
        lowering.emit(
            "expert_total", node, {"format": format}, **common, **_terms(lowering, {}), rows=rows,
            k=1, ranks=1, joined=0, shares=0, has_shares=0, **_choices(lowering, ids),
            **row_arguments(format, inner),
            grid=(_row_blocks(rows, format, cut(inner).lanes), ids.size),
        )  # fmt: skip
        return
    width, capacity, first = groups(tiles)
    listed, sums = lowering.result(tiles), common.pop("has_bias")
    emit_tile(
        lowering, node, format, width, rows, inner, capacity, **common, order=Ref(listed),
        groups=Ref(listed, first), grouped=1, sums=sums,
    )  # fmt: skip


def _few_floats(
    lowering: Lowering, node: Tensor, format: str, rows: int, inner: int, ids: Tensor,
    common: dict[str, Any],
) -> None:  # fmt: skip
    name, constants, row = "expert_rows_half", {"format": format}, float_arguments(format, inner)
    each = half_rows(row["shift"])
    if format == "F32":
        name, constants = "expert_rows_float", {}
        each = WARPS * rows_at_once(format, 1 << row["shift"])
    arguments = common | row | _choices(lowering, ids)
    lowering.emit(
        name, node, constants, **arguments, rows=rows, grid=(-(-rows // each), ids.size)
    )  # fmt: skip


@lowers("linear_id_pair")
def linear_id_pair(lowering: Lowering, node: Tensor) -> None:
    """Gate and up of each choice, and of a shared expert, gated and packed, in one launch."""
    x, gate, _, ids, up, *rest = node.inputs
    shared, opened = node.attrs.get("shared", 0), node.attrs.get("opened", 0)
    bias = rest[: len(rest) - 2 * shared - 2 * opened]
    joined: list[Any] = [
        lowering.weight(w, "repacked") for w in rest[len(bias) :][: 2 * shared]
    ] or [0, 0]
    floats, opener = rest[-2:] if opened else (None, None)
    rows, inner, format = int(gate.shape[1]), int(gate.shape[2]), packed_type(gate.dtype)
    k, tokens = int(ids.shape[1]), int(ids.shape[0])
    how = packed(lowering, node, tokens * (k + shared), rows)
    opening = lowering.room(node, "opening", 4 * tokens)
    lowering.router_results[node] = {"opening": opening.ref.buffer}
    lowering.emit(
        "expert_pair", node, {"format": format}, x=Ref(lowering.result(x)), out=how["out"],
        gate=lowering.weight(gate, "repacked"), up=lowering.weight(up, "repacked"),
        gate_bias=lowering.weight(bias[0], "vector") if bias else 0,
        up_bias=lowering.weight(bias[1], "vector") if bias else 0, has_bias=int(bool(bias)),
        shared_gate=joined[0], shared_up=joined[1], opened=opened,
        floats=Ref(lowering.result(floats)) if floats is not None else 0,
        opener=lowering.weight(opener, "vector") if opener is not None else 0,
        opening=opening if opened else 0, float_shift=float_lanes(inner).bit_length() - 1,
        units=inner // UNIT, k=k, ranks=k + shared, rows=rows, every=node.attrs["every"],
        out_stretches=how["stretches"], out_length=how["length"],
        clamp=int("alpha" in node.attrs), alpha=node.attrs.get("alpha", 0),
        limit=node.attrs.get("limit", 0), ids=lowering.read(ids), live=lowering.live(ids),
        **row_arguments(format, inner), grid=(cut(rows).places, tokens * (k + shared)),
    )  # fmt: skip
    assert INNER == 32, "a block of threads packs one block"


@lowers("linear_id_sum")
def linear_id_sum(lowering: Lowering, node: Tensor) -> None:
    """The last product of each choice, summed by weight with what follows, in one launch."""
    x, w, _, ids, shares, *rest = node.inputs
    rows, inner, format = int(w.shape[1]), int(w.shape[2]), packed_type(w.dtype)
    shared, opened = node.attrs.get("shared", 0), node.attrs.get("opened", 0)
    bias, others = rest[: node.attrs["bias"]], rest[node.attrs["bias"] :]
    names, k = node.attrs.get("terms", ()), int(ids.shape[1])
    terms = _terms(lowering, dict(zip(names, others[len(others) - len(names) :], strict=True)))
    if opened:
        opening = lowering.router_results[x]["opening"]
        terms |= {"opening": Ref(opening), "opening_stride": 1, "has_opening": 1}
    lowering.emit(
        "expert_total", node, {"format": format}, weights=lowering.weight(w, "repacked"),
        joined=lowering.weight(others[0], "repacked") if shared else 0, ranks=k + shared,
        x=Ref(lowering.result(x)), ids=lowering.read(ids), shares=lowering.read(shares),
        has_shares=1, bias=lowering.weight(bias[0], "vector") if bias else 0, has_bias=len(bias),
        out=lowering.write(node), live=lowering.live(ids), rows=rows, k=k,
        every=node.attrs["every"], **terms, **row_arguments(format, inner),
        grid=(_row_blocks(rows, format, cut(inner).lanes), int(ids.shape[0])),
    )  # fmt: skip


def _terms(lowering: Lowering, terms: dict[str, Tensor]) -> dict[str, Any]:
    """What is added to a sum over experts; a norm behind it comes later."""
    places: dict[str, Any] = dict(NONE)
    for name, term in (("addend", "shared"), ("opening", "gate"), ("residual", "residual")):
        places |= {name: 0, f"{name}_stride": 0, f"has_{name}": int(term in terms)}
        if term in terms:
            places[name], _, _, places[f"{name}_stride"] = lowering.rows(terms[term])
    return places


def _choices(lowering: Lowering, ids: Tensor) -> dict[str, Any]:
    """Where ids are, and how many of them mean something."""
    return {"ids": lowering.read(ids), "live": lowering.live(ids, int(ids.shape[1]))}


def _row_blocks(rows: int, format: str, lanes: int) -> int:
    return -(-rows // rows_at_once(format, lanes))
