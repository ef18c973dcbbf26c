"""Lowering of ops/delta.py: short convolution and recurrent state, fused or plain."""

from __future__ import annotations

from typing import Any

from runtime.backends.cuda.kernels.delta import COLUMNS, ROWS
from runtime.backends.cuda.kernels.short_conv import BLOCK, WARPS
from runtime.backends.cuda.rules.matmul import packed
from runtime.backends.cuda.rules.norm import emit_norm, gate_of
from runtime.backends.cuda.rules.registry import lowers
from runtime.backends.plan.lowering import Declined, Lowering, Out
from runtime.backends.plan.plan import Ref
from runtime.ops.tensor import Tensor

_AT_ONCE = 16  # sequences that have blocks of their own


def _slots(
    lowering: Lowering, state: Tensor, spans: Tensor, slot_in: Tensor, slot_out: Tensor
) -> dict[str, Any]:
    """The arguments that say where a sequence's tokens and its state are."""
    return {
        "state": Out(lowering.state(state), True), "spans": lowering.read(spans),
        "slot_in": lowering.read(slot_in), "slot_out": lowering.read(slot_out),
        "live": lowering.live(spans),
    }  # fmt: skip


@lowers("short_conv", "conv_post")
def short_conv(lowering: Lowering, node: Tensor) -> None:
    """Rows of channels; `conv_post` has SiLU behind it, and the L2 norm of some heads."""
    x, w, *where = node.inputs
    (channels, taps), tokens, sequences = map(int, w.shape), int(x.shape[0]), int(where[1].shape[0])
    address, _, _, stride = lowering.rows(x)
    first, end = node.attrs.get("normed", (0, 0))
    dim = node.attrs.get("head_dim", BLOCK)
    inside = dim <= BLOCK  # a head and its norm in one warp
    block = dim if inside else BLOCK
    rows = sequences + (tokens if tokens > taps - 1 else 0)
    out = lowering.write(node)
    lowering.emit(
        "short_conv", node, {"four": taps == 4}, x=address,
        w=lowering.read(w), **_slots(lowering, *where), out=out, channels=channels,
        taps=taps, block=block, x_stride=stride, norm_first=first if inside else 0,
        norm_end=end if inside else 0, eps=node.attrs.get("eps", 0.0),
        active=node.op == "conv_post", owners=sequences,
        grid=(-(-channels // block), -(-rows // WARPS)),
    )  # fmt: skip
    if not inside:
        heads, strides = Ref(out.ref.buffer, 4 * first), (channels, dim)
        grid = ((end - first) // dim, tokens)
        emit_norm(lowering, node, heads, Out(heads, True), dim, grid, strides, strides, 1)


@lowers("l2_norm")
def l2_norm(lowering: Lowering, node: Tensor) -> None:
    """One row per element of all axes but the last; heads of a token may lie apart."""
    (x,) = node.inputs
    n = int(x.shape[-1])
    if x.ndim == 3:
        address, stride, head_stride = lowering.heads(x)
        grid, strides = (int(x.shape[1]), int(x.shape[0])), (stride, head_stride)
    else:
        address, _, _, stride = lowering.rows(x)
        grid, strides = (max(1, x.size // n), 1), (0, stride)
    out_strides = (grid[0] * n, n)
    emit_norm(lowering, node, address, lowering.write(node), n, grid, strides, out_strides, 1)


@lowers("gated_delta", "delta_step")
def gated_delta(lowering: Lowering, node: Tensor) -> None:
    """`delta_step` has the raw projections as gates, and weights a and perhaps dt."""
    q, _, v, *_ = node.inputs
    heads, dk, dv = int(v.shape[1]), int(q.shape[2]), int(v.shape[2])
    rows = next((n for n in ROWS if dk <= n), None)
    if rows is None:
        raise Declined(f"heads of {dk} are more than {ROWS[-1]}")
    at_once = min(int(node.inputs[6].shape[0]), _AT_ONCE)
    lowering.emit(
        "gated_delta", node, {"rows": rows}, **_recurrence(lowering, node, node.inputs),
        out=lowering.write(node), dk=dk, dv=dv, at_once=at_once,
        grid=(-(-dv // COLUMNS), heads, at_once),
    )  # fmt: skip


@lowers("delta_layer")
def delta_layer(lowering: Lowering, node: Tensor) -> None:
    """All between the projections of a layer, for few tokens."""
    x, filters, conv, alpha, beta, state, *where = node.inputs[:9]
    *weights, w, gate = node.inputs[9:]
    (tokens, heads, dim), attrs = map(int, gate.shape), node.attrs
    places: dict[str, Any] = {name: attrs[name] for name in ("q_at", "k_at", "v_at")}
    for name, source in (("x", x), ("alpha", alpha), ("beta", beta)):
        places[name], _, _, places[f"{name}_stride"] = lowering.tokens(source)
    places["a"], places["dt"] = (*map(lowering.read, weights), 0, 0)[:2]
    sequences, key_heads = int(where[0].shape[0]), attrs["key_heads"]
    lowering.emit(
        "delta_layer", node, {"dim": dim}, **places, **_slots(lowering, state, *where),
        filters=lowering.read(filters), conv=Out(lowering.state(conv), True),
        w=lowering.weight(w, "vector"), **gate_of(lowering, gate), channels=int(filters.shape[0]),
        tickets=lowering.tickets(node, sequences * key_heads), heads=heads, key_heads=key_heads,
        tiled=attrs["order"] == "tiled", gates=len(weights), scale=attrs["scale"],
        l2_eps=attrs["l2_eps"], eps=attrs["eps"], **packed(lowering, node, tokens, heads * dim),
        grid=(heads, sequences),
    )  # fmt: skip


def _recurrence(lowering: Lowering, node: Tensor, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """The arguments of the recurrence; tokens of all inputs may lie apart."""
    *given, state, spans, slot_in, slot_out = inputs[:9]
    weights, found = inputs[9:], dict[str, Any]()
    for name, x in zip(("q", "k", "v", "decay", "beta"), given, strict=True):
        found[name], _, _, found[f"{name}_stride"] = lowering.tokens(x)
    found["a"], found["dt"] = (*map(lowering.read, weights), 0, 0)[:2]
    return found | _slots(lowering, state, spans, slot_in, slot_out) | {
        "heads": int(given[2].shape[1]), "key_heads": int(given[0].shape[1]),
        "tiled": node.attrs["order"] == "tiled", "scale": node.attrs["scale"],
        "gates": len(weights),
    }  # fmt: skip
