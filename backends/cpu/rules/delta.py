"""Lowering of ops/delta.py: short convolution and recurrent state, fused or plain."""

from __future__ import annotations

from typing import Any

from runtime.backends.cpu.abi import CONV_BLOCK, MAX_TAPS
from runtime.backends.cpu.rules.registry import lowers
from runtime.backends.cpu.sizes import conv_scratch_nbytes, delta_scratch_nbytes, float_bits
from runtime.backends.plan.lowering import Declined, Lowering, Out
from runtime.ops.cost import page_nbytes
from runtime.ops.tensor import Tensor


def _slots(
    lowering: Lowering, state: Tensor, spans: Tensor, slot_in: Tensor, slot_out: Tensor
) -> dict[str, Any]:
    """The arguments that say where a sequence's tokens and its state are."""
    return {
        "state": Out(lowering.state(state), True), "slot_bytes": page_nbytes(state.base),
        "spans": lowering.read(spans), "slot_in": lowering.read(slot_in),
        "slot_out": lowering.read(slot_out), "live": lowering.live(spans),
    }  # fmt: skip


@lowers("short_conv", "conv_post")
def short_conv(lowering: Lowering, node: Tensor) -> None:
    """Rows of channels; `conv_post` has SiLU behind it, and the L2 norm of some heads."""
    x, w, *where = node.inputs
    channels, taps = int(w.shape[0]), int(w.shape[1])
    if taps > MAX_TAPS:
        raise Declined(f"{taps} taps are more than {MAX_TAPS}")
    address, _, _, stride = lowering.rows(x)
    block = node.attrs.get("head_dim", CONV_BLOCK)
    scratch = conv_scratch_nbytes(block, taps)
    first, end = node.attrs.get("normed", (0, 0))
    lowering.emit(
        node.op, node, x=address, w=lowering.read(w), **_slots(lowering, *where),
        out=lowering.write(node), channels=channels, taps=taps, block=block, x_stride=stride,
        norm_first=first, norm_end=end, eps=float_bits(node.attrs.get("eps", 0.0)),
        scratch=Out(lowering.scratch(scratch)), scratch_bytes=scratch,
    )  # fmt: skip


@lowers("l2_norm")
def l2_norm(lowering: Lowering, node: Tensor) -> None:
    """One row per element of all axes but the last; heads of a token may lie apart."""
    (x,) = node.inputs
    n, heads = int(x.shape[-1]), 1
    if x.ndim == 3:
        address, stride, head_stride = lowering.heads(x)
        live, heads = lowering.live(x), int(x.shape[1])
    else:
        address, _, live, stride = lowering.rows(x)
        head_stride = 0
    lowering.emit(
        "l2_norm", node, x=address, out=lowering.write(node), live=live, heads=heads, n=n,
        x_stride=stride, head_stride=head_stride, eps=float_bits(node.attrs["eps"]),
    )  # fmt: skip


@lowers("gated_delta", "delta_step")
def gated_delta(lowering: Lowering, node: Tensor) -> None:
    """`delta_step` has the raw projections as gates, and weights a and perhaps dt."""
    q, k, v, decay, beta, *where = node.inputs
    heads, dk, dv = int(v.shape[1]), int(q.shape[2]), int(v.shape[2])
    (qa, _, _, qs), (ka, _, _, ks), (va, _, _, vs) = (lowering.tokens(x) for x in (q, k, v))
    (da, _, _, ds), (ba, _, _, bs) = (lowering.tokens(x) for x in (decay, beta))
    slots, weights = where[:4], [lowering.read(w) for w in where[4:]]
    a, dt = (*weights, 0, 0)[:2]
    scratch = delta_scratch_nbytes(dk)
    lowering.emit(
        "gated_delta", node, {"gates": "raw" if weights else "given"}, q=qa, k=ka, v=va, decay=da,
        beta=ba, q_stride=qs, k_stride=ks, v_stride=vs, decay_stride=ds, beta_stride=bs, dt=dt,
        a=a, **_slots(lowering, *slots), out=lowering.write(node), heads=heads,
        key_heads=int(q.shape[1]), dk=dk, dv=dv, tiled=int(node.attrs["order"] == "tiled"),
        scale=float_bits(node.attrs["scale"]), scratch=Out(lowering.scratch(scratch)),
        scratch_bytes=scratch,
    )  # fmt: skip
