"""Gated delta-net layers (Yang et al. 2024): short convolution and recurrent state of a sequence.

State lies in slots. A sequence of the step reads its state from slot `slot_in[s]` (-1: zeros) and
leaves the new one in `slot_out[s]`, so fork and snapshot cost nothing. `spans[s]` = (first row,
count) are its tokens in the step, in order and without gaps.
"""

from __future__ import annotations

import numpy as np

from runtime.ops.dtypes import I32
from runtime.ops.registry import Arg, Case, Kind, need, op, same_shape
from runtime.ops.tensor import Shape, Tensor

ORDERS = ("grouped", "tiled")


def _need_slots(x: Tensor, state: Tensor, spans: Tensor, slot_in: Tensor, slot_out: Tensor) -> None:
    need(state.base.op == "state", f"{state!r} is no state")
    need(spans.ndim == 2 and spans.shape[1] == 2, f"spans must be [sequences, 2], got {spans!r}")
    for slots in (slot_in, slot_out):
        need(slots.shape == spans.shape[:1], f"{slots!r} must have one slot per sequence")


def _conv_shape(
    x: Tensor, w: Tensor, state: Tensor, spans: Tensor, slot_in: Tensor, slot_out: Tensor
) -> Shape:
    _need_slots(x, state, spans, slot_in, slot_out)
    need(x.ndim == 2 and w.ndim == 2, f"needs x [T, channels] and w [channels, taps], got {w!r}")
    need(w.shape[0] == x.shape[1], f"{w.shape[0]} filters for {x.shape[1]} channels")
    room = (w.shape[1] - 1, x.shape[1])
    need(tuple(state.shape[1:]) == room, f"state must be [slots, {room[0]}, {room[1]}]")
    return x.shape


def _runs(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    return np.array([(0, 3), (3, 1), (4, 5)][: shape[0]], np.int32)


def _slots_in(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    return np.array([2, -1, 2][: shape[0]], np.int32)


def _slots_out(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    return np.array([0, 1, 3][: shape[0]], np.int32)


_STEP = (Arg((3, 2), I32, _runs), Arg((3,), I32, _slots_in), Arg((3,), I32, _slots_out))


@op(
    "short_conv",
    kind=Kind.STATEFUL,
    axes="T c, c Taps, Slots Taps c, S Span, S, S -> T c",
    picks={2: 3},
    reads=(2,),
    writes=(2,),
    shape=_conv_shape,
    flops=lambda node, seen: 2 * seen.size(node) * int(node.inputs[1].shape[1]),
    cases=[
        Case(((9, 96), Arg((96, 4), leaf="weight"), Arg((4, 3, 96), leaf="slots"), *_STEP)),
        Case(((9, 40), Arg((40, 2), leaf="weight"), Arg((4, 1, 40), leaf="slots"), *_STEP)),
    ],
)
def short_conv(
    x: np.ndarray, w: np.ndarray, state: np.ndarray, spans: np.ndarray, slot_in: np.ndarray,
    slot_out: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """y[t, c] = sum over j of w[c, j] * x[t - K + 1 + j, c], causal, K taps, per channel.

    Inputs before the step come from state [slots, K - 1, C], oldest first; the last K - 1 inputs
    are left there. Changes `state`.
    """
    taps, out = w.shape[1], np.empty(x.shape, np.result_type(x, w))
    for (first, count), source, target in zip(spans, slot_in, slot_out, strict=True):
        past = state[source] if source >= 0 else np.zeros_like(state[0])
        rows = np.concatenate([past, x[first : first + count]])
        for t in range(count):
            out[first + t] = (w.T * rows[t : t + taps]).sum(0)
        state[target] = rows[count:]
    return out


def _delta_shape(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor, spans: Tensor,
    slot_in: Tensor, slot_out: Tensor, *, scale: float, order: str,
) -> Shape:  # fmt: skip
    _need_slots(q, state, spans, slot_in, slot_out)
    need(order in ORDERS, f"order {order!r} is not one of {ORDERS}")
    need(q.ndim == 3 and q.shape == k.shape, f"q and k must be [T, key heads, dk]: {k!r}")
    need(v.shape[1] % q.shape[1] == 0, f"{v.shape[1]} value heads over {q.shape[1]} key heads")
    need(decay.shape == beta.shape == v.shape[:2], "decay and beta must be [T, value heads]")
    room = (v.shape[1], q.shape[2], v.shape[2])
    need(tuple(state.shape[1:]) == room, f"state must be [slots, {', '.join(map(str, room))}]")
    return v.shape


def _delta_axes(node: Tensor) -> str:
    heads = "(k r)" if node.attrs["order"] == "grouped" else "(r k)"
    inputs = f"T k D, T k D, T {heads} E, T {heads}, T {heads}, Slots {heads} D E"
    return f"{inputs}, S Span, S, S -> T {heads} E"


def _decay(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    return -2 * rng.random(shape)


def _unit(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    x = rng.standard_normal(shape)
    return x / np.sqrt((x * x).sum(-1, keepdims=True))


def _delta_case(key_heads: int, heads: int, dk: int, dv: int, order: str) -> Case:
    key = Arg((9, key_heads, dk), make=_unit)
    beta = Arg((9, heads), make=lambda rng, shape: rng.random(shape))
    args = (key, key, (9, heads, dv), Arg((9, heads), make=_decay), beta)
    state = Arg((4, heads, dk, dv), leaf="slots")
    return Case((*args, state, *_STEP), {"scale": dk**-0.5, "order": order})


@op(
    "gated_delta",
    kind=Kind.STATEFUL,
    axes=_delta_axes,
    picks={5: 6},
    reads=(5,),
    writes=(5,),
    shape=_delta_shape,
    flops=lambda node, seen: 7 * seen.size(node) * int(node.inputs[0].shape[2]),
    cases=[
        _delta_case(2, 4, 32, 32, "grouped"),
        _delta_case(2, 4, 32, 48, "tiled"),
        _delta_case(3, 3, 16, 20, "grouped"),
    ],
)
def gated_delta(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, decay: np.ndarray, beta: np.ndarray,
    state: np.ndarray, spans: np.ndarray, slot_in: np.ndarray, slot_out: np.ndarray, *,
    scale: float, order: str,
) -> np.ndarray:  # fmt: skip
    """The gated delta rule, token by token and per value head; state S is [dk, dv].

    S *= exp(decay);  S += k (beta (v - S^T k))^T;  o = S^T (scale q). Value head h uses key head
    h // (value heads / key heads) in order "grouped", h % key heads in order "tiled". Changes
    `state` [slots, value heads, dk, dv].
    """
    picked = _key_heads(v.shape[1], q.shape[1], order)
    out = np.empty(v.shape, np.result_type(q, v))
    for (first, count), source, target in zip(spans, slot_in, slot_out, strict=True):
        S = np.array(state[source] if source >= 0 else np.zeros_like(state[0]), out.dtype)
        for t in range(first, first + count):
            S *= np.exp(decay[t])[:, None, None]
            error = v[t] - np.einsum("hij,hi->hj", S, k[t, picked])
            S += k[t, picked][:, :, None] * (beta[t][:, None] * error)[:, None, :]
            out[t] = np.einsum("hij,hi->hj", S, q[t, picked]) * scale
        state[target] = S
    return out


def _key_heads(heads: int, key_heads: int, order: str) -> np.ndarray:
    """The key head of each value head."""
    picked = np.arange(heads)
    return picked // (heads // key_heads) if order == "grouped" else picked % key_heads


@op(
    "l2_norm",
    kind=Kind.ROWWISE,
    shape=lambda x, *, eps: x.shape,
    flops=4,
    cases=[Case(((3, 2, 37),), {"eps": 1e-6}), Case(((5, 64),), {"eps": 1e-6})],
)
def l2_norm(x: np.ndarray, *, eps: float) -> np.ndarray:
    """x / sqrt(sum(x^2) + eps) over the last axis."""
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + eps)


@op("softplus", kind=Kind.ELEMENTWISE, shape=same_shape, flops=5, cases=[Case(((3, 50),))])
def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + exp(x)), exact for large |x|."""
    return np.logaddexp(0, x)
