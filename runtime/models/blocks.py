"""Blocks that several architectures share. Shapes: T tokens, H heads, K KV heads, d head size."""

from __future__ import annotations

from typing import NamedTuple

from runtime import ops
from runtime.errors import ModelError
from runtime.models.keys import Keys
from runtime.models.linear import linear, projections, scaled
from runtime.models.rotary import RotarySizes
from runtime.models.step import CacheLayer, Step
from runtime.models.weights import Weights
from runtime.ops.tensor import Tensor

SWIGLU_ALPHA = 1.702  # of the clamped SwiGLU


class AttentionSizes(NamedTuple):
    """Heads, KV heads and head sizes of attention, and what it has beside the plain form.

    qk_norm: RMS norms on queries and keys. gated: the output of each head is multiplied by the
    sigmoid of a gate that lies behind its query. window: only so many last places are seen, 0 for
    all. sinks: each head has a logit that takes a share of the softmax.
    """

    heads: int
    kv_heads: int
    dim: int
    v_dim: int
    eps: float
    rope_style: str = "neox"
    qk_norm: bool = False
    gated: bool = False
    window: int = 0
    sinks: bool = False

    @staticmethod
    def read(
        keys: Keys, hidden: int, eps: float, rope_style: str = "neox", qk_norm: bool = False,
        gated: bool = False, sinks: bool = False, holes: bool = False,
    ) -> AttentionSizes:  # fmt: skip
        """From metadata; ModelError where heads do not divide.

        holes: lists by layer have zeros where a layer is of another kind.
        """
        heads = keys.count("attention.head_count", holes=holes)
        kv_heads = keys.count("attention.head_count_kv", heads, holes=holes)
        listed, layers = len(keys.counts("attention.head_count_kv")), keys.count("block_count")
        if listed > 1 and listed not in (layers, keys.layers()):
            raise ModelError(
                f"{keys.source}: {keys.architecture}.attention.head_count_kv is a list of {listed} "
                f"for {layers} layers: the metadata contradicts itself"
            )
        if heads % kv_heads:
            raise ModelError(
                f"{keys.source}: {heads} heads do not divide into {kv_heads} KV heads: the "
                "metadata contradicts itself"
            )
        dim = keys.count("attention.head_dim", max(1, hidden // heads))  # Ollama's key
        dim = keys.count("attention.key_length", dim)
        v_dim = keys.count("attention.value_length", dim)
        return AttentionSizes(
            heads, kv_heads, dim, v_dim, eps, rope_style, qk_norm, gated, sinks=sinks
        )

    @property
    def cache(self) -> CacheLayer:
        """What one layer keeps of a token."""
        return CacheLayer(self.kv_heads, self.dim, self.v_dim)


def embedding(
    w: Weights, step: Step, vocabulary: int, hidden: int, name: str = "token_embd.weight"
) -> tuple[Tensor, Tensor]:
    """The embeddings of all tokens, and this step's rows of them or vectors, [T, hidden]."""
    embeddings = w(name, vocabulary, hidden)
    x = ops.get_rows(embeddings, step.tokens, name="embedding")
    if step.vectors is not None and step.from_table is not None:
        x = ops.add(ops.row_scale(x, step.from_table), step.vectors, name="embedding+vectors")
    return embeddings, x


def angles(w: Weights, step: Step, size: RotarySizes, name: str = "inv_freq") -> Tensor:
    """cos and sin of this step's positions, [T, half, 2]; M-RoPE picks a position per frequency."""
    rotary = size.rotary(w, step.context)
    inv_freq = ops.constant(name, rotary.inv_freq)
    if rotary.components is None:
        return ops.rope_angles(step.positions, inv_freq, magnitude=rotary.magnitude)
    components = ops.constant("rope_components", rotary.components)
    return ops.rope_angles(step.positions, inv_freq, components, magnitude=rotary.magnitude)


def logits(
    w: Weights, step: Step, x: Tensor, embeddings: Tensor, eps: float, bias: bool = False
) -> Tensor:
    """[R, vocabulary] of the wanted rows; without an output matrix the embedding serves as one."""
    x = ops.select_rows(x, step.output_rows)  # [R, hidden]
    x = ops.rms_norm(x, w("output_norm.weight", x.shape[1]), eps=eps, name="output_norm")
    tied = "output.weight" not in w
    y = ops.matmul(x, embeddings if tied else w("output.weight", *embeddings.shape), name="logits")
    y = y if tied else scaled(w, "output", y)
    shift = w.optional("output.bias", embeddings.shape[0]) if bias else None
    return y if shift is None else ops.add(y, shift, name="logits+bias")


def attention(
    w: Weights, step: Step, layer: int, x: Tensor, angles: Tensor, size: AttentionSizes
) -> Tensor:
    """Causal self-attention with grouped KV heads, rotary positions and a paged cache."""
    at, d = f"blk.{layer}", size.dim
    q, keys, values = _cached(w, step, layer, x, angles, size)
    gate = None
    if size.gated:
        gate = ops.slice_(q, axis=2, start=d, stop=d + size.v_dim)
        q = ops.slice_(q, axis=2, start=0, stop=d)
    if size.qk_norm:
        q = ops.rms_norm(q, w(f"{at}.attn_q_norm.weight", d), eps=size.eps, name=f"{at}.q_norm")
    q = ops.rope(q, angles, style=size.rope_style, name=f"{at}.q_rope")
    sinks = (w(f"{at}.attn_sinks.weight", size.heads),) if size.sinks else ()
    y = ops.attention(
        q, keys, values, step.block_table, step.sequences, step.places, *sinks,
        scale=d**-0.5, window=size.window, name=f"{at}.attention",
    )  # [T, H, v_dim]  # fmt: skip
    if gate is not None:
        y = ops.mul(y, ops.sigmoid(gate), name=f"{at}.gated")
    hidden = x.shape[-1]
    return linear(w, f"{at}.attn_output", ops.merge_heads(y), hidden, f"{at}.attn_out")


def cached(
    w: Weights, step: Step, layer: int, x: Tensor, angles: Tensor, size: AttentionSizes
) -> tuple[Tensor, Tensor]:
    """What attention keeps of this step's tokens: the pages of keys and of values, written."""
    return _cached(w, step, layer, x, angles, size)[1:]


def _cached(
    w: Weights, step: Step, layer: int, x: Tensor, angles: Tensor, size: AttentionSizes
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries as they are projected, with their gates; pages of keys and values, written."""
    at, H, K, d = f"blk.{layer}", size.heads, size.kv_heads, size.dim
    width = d + size.v_dim if size.gated else d
    q, k, v = projections(w, at, x, {"q": H * width, "k": K * d, "v": K * size.v_dim})
    q, k, v = ops.split_heads(q, H), ops.split_heads(k, K), ops.split_heads(v, K)  # [T, H, width]
    if size.qk_norm:
        k = ops.rms_norm(k, w(f"{at}.attn_k_norm.weight", d), eps=size.eps, name=f"{at}.k_norm")
    k = ops.rope(k, angles, style=size.rope_style, name=f"{at}.k_rope")
    keys, values = step.k[layer], step.v[layer]
    keys = ops.kv_write(k, keys, step.kv_slots, which="k", kv=keys.dtype.name)
    values = ops.kv_write(v, values, step.kv_slots, which="v", kv=values.dtype.name)
    return q, keys, values


def swiglu(gate: Tensor, up: Tensor, label: str, limit: float = 0.0) -> Tensor:
    """silu(gate) * up (Shazeer 2020); clamped as in gpt-oss where there is a limit."""
    if limit:
        return ops.swiglu_oai(gate, up, alpha=SWIGLU_ALPHA, limit=limit, name=label)
    return ops.mul(ops.silu(gate), up, name=label)


def swiglu_ffn(w: Weights, layer: int, x: Tensor, intermediate: int) -> Tensor:
    """down(silu(gate(x)) * up(x))."""
    at = f"blk.{layer}"
    gate = linear(w, f"{at}.ffn_gate", x, intermediate, f"{at}.gate")  # [T, intermediate]
    up = linear(w, f"{at}.ffn_up", x, intermediate, f"{at}.up")
    product = swiglu(gate, up, f"{at}.swiglu")
    return linear(w, f"{at}.ffn_down", product, x.shape[-1], f"{at}.ffn_out")
