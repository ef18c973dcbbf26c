"""The gated delta-net layer (Yang et al. 2024), as Qwen3-Next and its successors have it.

Shapes: T tokens, C channels of the convolution (queries, keys, values), Hk key heads of dk, Hv
value heads of dv.
"""

from __future__ import annotations

from typing import NamedTuple

from runtime import ops
from runtime.errors import ModelError
from runtime.models.keys import Keys
from runtime.models.linear import linear
from runtime.models.step import StateLayer, Step
from runtime.models.weights import Weights
from runtime.ops.cuts import Runs
from runtime.ops.tensor import Tensor

L2_EPS = 1e-6  # in the norm of queries and keys, not in the files


class DeltaSizes(NamedTuple):
    """Heads, their sizes, taps of the convolution; `order` of value heads: see ops.gated_delta."""

    key_heads: int
    heads: int
    k_dim: int
    v_dim: int
    taps: int
    eps: float
    order: str

    @staticmethod
    def read(keys: Keys, eps: float, order: str) -> DeltaSizes:
        """From metadata; ModelError for what is missing or does not divide."""
        if keys.has("ssm.v_head_reordered"):  # Ollama's key
            order = "tiled" if keys.flag("ssm.v_head_reordered", True) else "grouped"
        key_heads, heads = keys.count("ssm.group_count"), keys.count("ssm.time_step_rank")
        inner = keys.count("ssm.inner_size")
        problems = {
            f"ssm.time_step_rank: {heads} value heads over {key_heads} key heads": heads
            % key_heads,
            f"ssm.inner_size: {inner} values over {heads} value heads": inner % heads,
        }
        for message, rest in problems.items():
            if rest:
                raise ModelError(
                    f"{keys.source}: {keys.architecture}.{message} do not divide: the metadata "
                    "contradicts itself"
                )
        return DeltaSizes(
            key_heads, heads, keys.count("ssm.state_size"), inner // heads,
            keys.count("ssm.conv_kernel", least=2), eps, order,
        )  # fmt: skip

    def check(self, w: Weights, layer: int) -> None:
        """ModelError unless the small tensors of a layer have these sizes."""
        at = f"blk.{layer}"
        w(f"{at}.ssm_a", self.heads)
        w(f"{at}.ssm_norm.weight", self.v_dim)
        w(f"{at}.ssm_conv1d.weight", self.channels, self.taps)

    @property
    def channels(self) -> int:
        """Channels of the convolution: all queries, then all keys, then all values."""
        return 2 * self.key_heads * self.k_dim + self.heads * self.v_dim

    @property
    def state(self) -> StateLayer:
        """What one layer remembers of a sequence."""
        return StateLayer(self.taps, self.channels, self.heads, self.k_dim, self.v_dim)


def delta_net(w: Weights, step: Step, layer: int, x: Tensor, size: DeltaSizes) -> Tensor:
    """Convolution over q, k, v; the gated delta rule; the normed result times a gate."""
    at, memory = f"blk.{layer}", (step.spans, step.slot_in, step.slot_out)
    qkv, z = _qkv_and_gate(w, at, x, size)  # [T, C], [T, Hv * dv]
    alpha, beta = _alpha_and_beta(w, at, x, size)  # [T, Hv]
    filters = w(f"{at}.ssm_conv1d.weight", size.channels, size.taps)
    mixed = ops.short_conv(qkv, filters, step.conv[layer], *memory, name=f"{at}.conv")
    q, k, v = _heads(ops.silu(mixed, name=f"{at}.conv_silu"), size)
    q = ops.l2_norm(q, eps=L2_EPS, name=f"{at}.q_norm")  # [T, Hk, dk]
    k = ops.l2_norm(k, eps=L2_EPS, name=f"{at}.k_norm")
    pace = ops.softplus(ops.add(alpha, w(f"{at}.ssm_dt.bias", size.heads)))
    decay = ops.mul(pace, w(f"{at}.ssm_a", size.heads), name=f"{at}.decay")  # ssm_a: -exp(A_log)
    y = ops.gated_delta(
        q, k, v, decay, ops.sigmoid(beta), step.delta[layer], *memory,
        scale=size.k_dim**-0.5, order=size.order, name=f"{at}.delta",
    )  # [T, Hv, dv]  # fmt: skip
    y = ops.rms_norm(y, w(f"{at}.ssm_norm.weight", size.v_dim), eps=size.eps, name=f"{at}.y_norm")
    y = ops.mul(y, ops.silu(ops.split_heads(z, size.heads)), name=f"{at}.gated")
    return linear(w, f"{at}.ssm_out", ops.merge_heads(y), x.shape[-1], f"{at}.delta_out")


def _heads(x: Tensor, size: DeltaSizes) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of [T, C], as views [T, heads, dim]."""
    parts, at = [], 0
    for heads, dim in (
        (size.key_heads, size.k_dim), (size.key_heads, size.k_dim), (size.heads, size.v_dim)
    ):  # fmt: skip
        part = ops.slice_(x, axis=1, start=at, stop=at + heads * dim)
        parts.append(ops.split_heads(part, heads))
        at += heads * dim
    q, k, v = parts
    return q, k, v


def _qkv_and_gate(w: Weights, at: str, x: Tensor, size: DeltaSizes) -> tuple[Tensor, Tensor]:
    """Input of the convolution, and the gate of the output."""
    if f"{at}.ssm_in.weight" not in w:
        qkv = linear(w, f"{at}.attn_qkv", x, size.channels, f"{at}.qkv")
        return qkv, linear(w, f"{at}.attn_gate", x, size.heads * size.v_dim, f"{at}.z")
    # Older files: of each key head in turn its query, its key, its values, their gates.
    values = size.heads // size.key_heads * size.v_dim
    q, k, v, gates = _runs(size.key_heads, (size.k_dim, size.k_dim, values, values))
    gate_rows = size.heads * size.v_dim
    rows, name = size.channels + gate_rows, f"{at}.ssm_in"
    return (
        linear(w, name, x, size.channels, f"{at}.qkv", rows, (*q, *k, *v)),
        linear(w, name, x, gate_rows, f"{at}.z", rows, gates),
    )


def _alpha_and_beta(w: Weights, at: str, x: Tensor, size: DeltaSizes) -> tuple[Tensor, Tensor]:
    """What decay and beta are made of."""
    if f"{at}.ssm_ba.weight" not in w:
        alpha = linear(w, f"{at}.ssm_alpha", x, size.heads, f"{at}.alpha")
        return alpha, linear(w, f"{at}.ssm_beta", x, size.heads, f"{at}.beta")
    # Qwen3-Next: of each key head in turn the betas of its value heads, then their alphas.
    each = size.heads // size.key_heads
    betas, alphas = _runs(size.key_heads, (each, each))
    name, rows = f"{at}.ssm_ba", 2 * size.heads
    return (
        linear(w, name, x, size.heads, f"{at}.alpha", rows, alphas),
        linear(w, name, x, size.heads, f"{at}.beta", rows, betas),
    )


def _runs(groups: int, lengths: tuple[int, ...]) -> list[Runs]:
    """Rows of each part, where every group holds all parts one after another."""
    total, at = sum(lengths), 0
    found: list[Runs] = []
    for n in lengths:
        found.append(tuple((g * total + at, g * total + at + n) for g in range(groups)))
        at += n
    return found
