"""Blocks that several architectures share. Shapes: T tokens, H heads, d head size."""

from __future__ import annotations

from dataclasses import dataclass

from runtime import ops
from runtime.models.step import Step, Weights
from runtime.ops.tensor import Tensor


@dataclass(frozen=True)
class AttentionSizes:
    """Heads, KV heads and head size; `qk_norm` asks for RMS norms on queries and keys."""

    heads: int
    kv_heads: int
    dim: int
    eps: float
    rope_style: str
    qk_norm: bool = False
    v_dim: int = 0
    window: int = 0


def linear(w: Weights, name: str, x: Tensor, rows: int, label: str) -> Tensor:
    """x W^T, plus a bias where the file has one."""
    y = ops.matmul(x, w(f"{name}.weight", rows, x.shape[-1]), name=label)  # [T, rows]
    bias = w.optional(f"{name}.bias", rows)
    return y if bias is None else ops.add(y, bias, name=f"{label}+bias")


def attention(
    w: Weights, step: Step, layer: int, x: Tensor, angles: Tensor, size: AttentionSizes
) -> Tensor:
    """Causal self-attention with grouped KV heads, rotary positions and a paged cache."""
    at, H, K, d = f"blk.{layer}", size.heads, size.kv_heads, size.dim
    q = ops.split_heads(linear(w, f"{at}.attn_q", x, H * d, f"{at}.q"), H)  # [T, H, d]
    k = ops.split_heads(linear(w, f"{at}.attn_k", x, K * d, f"{at}.k"), K)  # [T, K, d]
    v_dim = size.v_dim or d
    v = ops.split_heads(linear(w, f"{at}.attn_v", x, K * v_dim, f"{at}.v"), K)
    if size.qk_norm:
        q = ops.rms_norm(q, w(f"{at}.attn_q_norm.weight", d), eps=size.eps, name=f"{at}.q_norm")
        k = ops.rms_norm(k, w(f"{at}.attn_k_norm.weight", d), eps=size.eps, name=f"{at}.k_norm")
    q = ops.rope(q, angles, style=size.rope_style, name=f"{at}.q_rope")
    k = ops.rope(k, angles, style=size.rope_style, name=f"{at}.k_rope")
    keys, values = step.k[layer], step.v[layer]
    keys = ops.kv_write(k, keys, step.slots, which="k", kv=keys.dtype.name)
    values = ops.kv_write(v, values, step.slots, which="v", kv=values.dtype.name)
    y = ops.attention(
        q, keys, values, step.table, step.sequences, step.places,
        scale=d**-0.5, window=size.window, name=f"{at}.attention",
    )  # [T, H, d]  # fmt: skip
    hidden = x.shape[-1]
    return linear(w, f"{at}.attn_output", ops.merge_heads(y), hidden, f"{at}.attn_out")


def swiglu_ffn(w: Weights, layer: int, x: Tensor, inner: int) -> Tensor:
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""
    at = f"blk.{layer}"
    gate = linear(w, f"{at}.ffn_gate", x, inner, f"{at}.gate")  # [T, inner]
    up = linear(w, f"{at}.ffn_up", x, inner, f"{at}.up")
    product = ops.mul(ops.silu(gate), up, name=f"{at}.swiglu")
    return linear(w, f"{at}.ffn_down", product, x.shape[-1], f"{at}.ffn_out")


def moe_ffn(
    w: Weights, layer: int, x: Tensor, experts: int, used: int, inner: int, normalize: bool
) -> Tensor:
    """The `used` best of `experts` SwiGLU networks per token, weighted by softmax scores."""
    at, hidden = f"blk.{layer}", x.shape[-1]
    scores = ops.matmul(x, w(f"{at}.ffn_gate_inp.weight", experts, hidden), name=f"{at}.scores")
    shares = ops.softmax(scores, name=f"{at}.shares")  # [T, experts]
    ids = ops.top_k(shares, k=used, name=f"{at}.experts")  # [T, used]
    weights = ops.take(shares, ids, name=f"{at}.expert_weights")
    if normalize:
        weights = ops.normalize(weights, name=f"{at}.expert_weights")
    gate = w(f"{at}.ffn_gate_exps.weight", experts, inner, hidden)
    up = w(f"{at}.ffn_up_exps.weight", experts, inner, hidden)
    down = w(f"{at}.ffn_down_exps.weight", experts, hidden, inner)
    g = ops.matmul_id(x, gate, ids, name=f"{at}.gate")  # [T, used, inner]
    u = ops.matmul_id(x, up, ids, name=f"{at}.up")
    product = ops.mul(ops.silu(g), u, name=f"{at}.swiglu")
    y = ops.matmul_id(product, down, ids, name=f"{at}.down")  # [T, used, hidden]
    return ops.expert_sum(y, weights, name=f"{at}.ffn_out")
