"""What every fused op computes: numpy, made of the references of the plain ops it stands for.

With these the reference backend runs graphs behind the passes too, and VALIDATE judges the kernels
of fused ops. A packed tensor means its values: float64 in the shape of its node, or, where rows
are gathered for experts, [tiles * C, n] with zeros in columns that have no row. Tiles mean int32
[tiles, 1 + C]: the expert, then the row of each column or -1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import runtime.ops as ops
from runtime.backends.passes.fuse_attention import attention_pack, qkv_post, sigmoid_gate_pack
from runtime.backends.passes.fuse_delta import conv_post, delta_layer, delta_step, gated_norm_pack
from runtime.backends.passes.fuse_experts import linear_id_pair, linear_id_sum
from runtime.backends.passes.fuse_ffn import (
    rms_norm_pack,
    router,
    router_ids,
    router_own,
    router_tiles,
    swiglu_pack,
    swiglu_pack_rows,
)
from runtime.backends.passes.packing import expert_tiles, linear, linear_id, pack, pack_rows
from runtime.ops.collective import both
from runtime.ops.moe import expert_sum
from runtime.ops.registry import Op
from runtime.ops.tensor import Tensor

Array = np.ndarray
_AT_ONCE = 1 << 24  # values of a matrix that are widened at a time


def product(x: Array, w: Array) -> Array:
    """x [..., n] times w [rows, n] in float64, [..., rows]; w may be float32 and is large."""
    step = max(1, _AT_ONCE // max(1, w.shape[1]))
    parts = [x @ w[at : at + step].astype(np.float64).T for at in range(0, len(w), step)]
    return np.concatenate(parts, -1)


def _linear(node: Tensor, x: Array, w: Array, *extra: Array) -> Array:
    return sum(extra, start=product(x, w))


def _linear_id(node: Tensor, x: Array, w: Array, tiles: Array, ids: Array, *bias: Array) -> Array:
    """Every live (token, rank) is in one column of one tile, unless its expert is elsewhere."""
    rows, every = tiles[:, 1:], node.attrs["every"]
    used, width = int(node.shape[1]), rows.shape[1]
    x = x.reshape(-1, x.shape[-1])
    out = np.full((ids.size, w.shape[1]), np.nan)
    for expert in np.unique(tiles[:, 0]):
        at = np.flatnonzero((tiles[:, :1] == expert) & (rows >= 0))
        row = rows.reshape(-1)[at]
        source = row // every if every else np.arange(len(tiles) * width)[at]
        out[row] = product(x[source], w[expert]) + (bias[0][expert] if bias else 0)
    return out.reshape(-1, used, w.shape[1])


def _gathered(x: Array, tiles: Array, divisor: int = 1) -> Array:
    rows = tiles[:, 1:].reshape(-1)
    found = x.reshape(-1, x.shape[-1])[np.maximum(rows, 0) // divisor]
    return np.where(rows[:, None] >= 0, found, 0)


def _expert_tiles(node: Tensor, ids: Array) -> Array:
    """Rows by expert, in order, C to a tile; ids below 0 are left out."""
    flat, width = ids.reshape(-1), node.attrs["C"]
    tiles = [np.zeros((0, 1 + width), np.int32)]
    for expert in np.unique(flat[flat >= 0]):
        rows = np.flatnonzero(flat == expert).astype(np.int32)
        filled = np.pad(rows, (0, -len(rows) % width), constant_values=-1)
        tiles.append(np.insert(filled.reshape(-1, width), 0, expert, axis=1))
    return np.concatenate(tiles)


def _router(node: Tensor, scores: Array, *numbers: Array) -> Array:
    attrs = node.attrs
    ids = ops.top_k.reference(scores, k=attrs["k"])
    if attrs["scoring"] == "softmax_topk":
        weights = ops.softmax.reference(ops.take.reference(scores, ids))
    else:
        shares = ops.OPS[attrs["scoring"]].reference(scores)
        weights = ops.take.reference(shares, ids)
    if attrs["normalize"]:
        weights = ops.normalize.reference(weights)
    return weights * attrs["scale"]


def _router_ids(node: Tensor, weights: Array, scores: Array) -> Array:
    return ops.top_k.reference(scores, k=int(node.shape[-1]))


def _router_own(node: Tensor, weights: Array, scores: Array, numbers: Array) -> Array:
    return numbers[_router_ids(node, weights, scores)]


def _router_tiles(node: Tensor, weights: Array, scores: Array, *numbers: Array) -> Array:
    """Every choice is a tile of its own, in order; those of other devices are none."""
    ids = _router_ids(node, weights, scores).reshape(-1)
    ids = numbers[0][ids] if numbers else ids
    return np.stack([ids, np.arange(len(ids))], 1)[ids >= 0].astype(np.int32)


def _swiglu(node: Tensor, gate: Array, up: Array) -> Array:
    bounds = {name: node.attrs[name] for name in ("alpha", "limit") if name in node.attrs}
    if bounds:
        return ops.swiglu_oai.reference(gate, up, **bounds)
    return ops.silu.reference(gate) * up


def _merged(x: Array) -> Array:
    """[T, heads, d] as [T, heads * d]."""
    return x.reshape(len(x), x.shape[1] * x.shape[2])


def _norm(node: Tensor, x: Array, w: Array) -> Array:
    return ops.rms_norm.reference(x, w, eps=node.attrs["eps"])


def _qkv_post(
    node: Tensor, q: Array, k: Array, v: Array, k_pages: Array, v_pages: Array, kv_slots: Array,
    *rest: Array,
) -> Array:  # fmt: skip
    attrs, found = node.attrs, dict(zip(node.attrs["optional"], rest, strict=True))

    def rotated(x: Array, block: int) -> Array:
        return ops.hadamard.reference(x, block=block) if block else x

    def turned(x: Array, norm: str) -> Array:
        x = _norm(node, x, found[norm]) if norm in found else x
        if "angles" in found:
            x = ops.rope.reference(x, found["angles"], style=attrs["style"])
        return rotated(x, attrs["k_rotation"])

    k, v = turned(k, "k_norm"), rotated(v, attrs["v_rotation"])
    ops.kv_write.reference(k, k_pages, kv_slots, which="k", kv=attrs["k_type"])
    ops.kv_write.reference(v, v_pages, kv_slots, which="v", kv=attrs["v_type"])
    return turned(q, "q_norm")


def _attention_pack(node: Tensor, *inputs: Array) -> Array:
    names = ("scale", "window", "softcap", "rotation")
    attrs = {name: node.attrs[name] for name in names if name in node.attrs}
    if not node.attrs["gated"]:
        return _merged(ops.attention.reference(*inputs, **attrs))
    *inner, gate = inputs
    return _merged(ops.attention.reference(*inner, **attrs) * ops.sigmoid.reference(gate))


def _conv_post(node: Tensor, x: Array, w: Array, *where: Array) -> Array:
    out = ops.silu.reference(ops.short_conv.reference(x, w, *where))
    first, end = node.attrs["normed"]
    heads = out[:, first:end].reshape(len(out), -1, node.attrs["head_dim"])
    out[:, first:end] = _merged(ops.l2_norm.reference(heads, eps=node.attrs["eps"]))
    return out


def _delta_step(
    node: Tensor, q: Array, k: Array, v: Array, alpha: Array, beta: Array, state: Array,
    spans: Array, slot_in: Array, slot_out: Array, a: Array, *dt: Array,
) -> Array:  # fmt: skip
    decay = ops.softplus.reference(sum(dt, start=alpha)) * a
    gates = decay, ops.sigmoid.reference(beta)
    where = state, spans, slot_in, slot_out
    return ops.gated_delta.reference(q, k, v, *gates, *where, **node.attrs)


def _delta_layer(
    node: Tensor, x: Array, filters: Array, kept: Array, alpha: Array, beta: Array, state: Array,
    spans: Array, slot_in: Array, slot_out: Array, *weights: Array,
) -> Array:  # fmt: skip
    attrs, where, (*gates, w, gate) = node.attrs, (spans, slot_in, slot_out), weights
    heads, dim = gate.shape[1:]
    y = ops.silu.reference(ops.short_conv.reference(x, filters, kept, *where))

    def part(name: str, count: int) -> Array:
        return y[:, attrs[name] : attrs[name] + count * dim].reshape(len(y), count, dim)

    q, k = (part(f"{n}_at", attrs["key_heads"]) for n in "qk")
    q, k = (ops.l2_norm.reference(h, eps=attrs["l2_eps"]) for h in (q, k))
    step = node.with_(attrs={name: attrs[name] for name in ("scale", "order")})
    values = part("v_at", heads)
    out = _delta_step(step, q, k, values, alpha, beta, state, *where, *gates)
    return _gated_norm(node, out, w, gate)


def _gated_norm(node: Tensor, y: Array, w: Array, gate: Array) -> Array:
    return _merged(_norm(node, y, w) * ops.silu.reference(gate))


def _expert_sum(node: Tensor, y: Array, weights: Array, *rest: Array) -> Array:
    names = node.attrs.get("terms", ())
    ids = rest[: len(rest) - len(names)]
    terms = dict(zip(names, rest[len(ids) :], strict=True))
    out = ops.expert_sum.reference(y, weights, *ids)
    if "shared" in terms:
        opening = ops.sigmoid.reference(terms["gate"]) if "gate" in terms else 1
        out = out + terms["shared"] * opening
    return out + terms["residual"] if "residual" in terms else out


def _linear_id_pair(
    node: Tensor, x: Array, gate: Array, tiles: Array, ids: Array, up: Array, *rest: Array
) -> Array:
    """Both products as [T, used, n], gated; that of a shared expert behind those of a token."""
    shared, opened = (node.attrs.get(name, 0) for name in ("shared", "opened"))
    bias = rest[: len(rest) - 2 * shared - 2 * opened]
    shaped = node.with_(shape=(*ids.shape, gate.shape[1]), attrs={"every": node.attrs["every"]})
    products = [
        _linear_id(shaped, x, w, tiles, ids, *bias[n : n + 1]) for n, w in enumerate((gate, up))
    ]
    out = _swiglu(node, *products)
    if not shared:
        return out
    joined = _swiglu(node, *(product(x, w) for w in rest[len(bias) : len(bias) + 2]))
    return np.concatenate([out, joined[:, None]], 1)


def _linear_id_sum(
    node: Tensor, x: Array, w: Array, tiles: Array, ids: Array, weights: Array, *rest: Array
) -> Array:
    bias, rest = rest[: node.attrs["bias"]], rest[node.attrs["bias"] :]
    shaped = node.with_(shape=(*ids.shape, w.shape[1]))
    used = int(ids.shape[1])
    if not node.attrs.get("shared"):
        return _expert_sum(node, _linear_id(shaped, x, w, tiles, ids, *bias), weights, ids, *rest)
    y = _linear_id(shaped, x[:, :used], w, tiles, ids, *bias)
    joined, rest = product(x[:, used], rest[0]), rest[1:]
    if node.attrs["opened"]:
        joined, rest = joined * ops.sigmoid.reference(product(*rest[:2])), rest[2:]
    return sum(rest, start=ops.expert_sum.reference(y, weights, ids) + joined)


# op -> (node, inputs as arrays) -> its result; states among the inputs are changed.
_MEANINGS: dict[Op, Callable[..., Array]] = {
    pack: lambda node, x: x,
    rms_norm_pack: _norm,
    swiglu_pack: _swiglu,
    sigmoid_gate_pack: lambda node, y, gate: _merged(y * ops.sigmoid.reference(gate)),
    gated_norm_pack: _gated_norm,
    attention_pack: _attention_pack,
    delta_layer: _delta_layer,
    pack_rows: lambda node, x, tiles: _gathered(x, tiles, node.attrs["divisor"]),
    swiglu_pack_rows: lambda node, g, u, tiles: _gathered(_swiglu(node, g, u), tiles),
    linear: _linear,
    linear_id: _linear_id,
    linear_id_pair: _linear_id_pair,
    linear_id_sum: _linear_id_sum,
    expert_tiles: _expert_tiles,
    expert_sum: _expert_sum,
    router: _router,
    router_ids: _router_ids,
    router_own: _router_own,
    router_tiles: _router_tiles,
    qkv_post: _qkv_post,
    conv_post: _conv_post,
    delta_step: _delta_step,
    both: lambda node, x, *others: x,
}
MEANINGS = {op.name: meaning for op, meaning in _MEANINGS.items()}
