"""Decoder-only transformers: RMS norm, grouped-query attention with RoPE, SwiGLU or experts.

Llama (Touvron et al. 2023) and its relatives; what differs between them is a row of VARIANTS in
the registry: rope style, norms on queries and keys, experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from runtime import ops
from runtime.errors import ModelError
from runtime.models import blocks
from runtime.models.keys import Keys
from runtime.models.rotary import Rotary, Scaling, rotary
from runtime.models.step import CacheLayer, Layers, Step, Weights


@dataclass(frozen=True)
class Variant:
    """What an architecture of this family does differently."""

    rope_style: str = "neox"
    qk_norm: bool = False
    experts: bool = False


@dataclass(frozen=True)
class Hyperparameters:
    """Sizes and constants of one model, as its file gives them."""

    layers: int
    hidden: int
    vocabulary: int
    context: int
    inner: int
    attention: blocks.AttentionSizes
    rotated: int
    base: float
    eps: float
    scaling: Scaling
    experts: int = 0
    experts_used: int = 0
    expert_inner: int = 0

    @staticmethod
    def read(keys: Keys, vocabulary: int, variant: Variant) -> Hyperparameters:
        """From metadata; ModelError for what is missing, contradictory or not implemented."""
        keys.refuse_unknown()
        hidden, heads = keys.count("embedding_length"), keys.count("attention.head_count")
        dim = keys.count("attention.key_length", hidden // heads)
        eps = keys.number("attention.layer_norm_rms_epsilon")
        context = keys.count("context_length")
        size = blocks.AttentionSizes(
            heads, keys.count("attention.head_count_kv", heads), dim, eps,
            variant.rope_style, variant.qk_norm, keys.count("attention.value_length", dim),
        )  # fmt: skip
        experts = keys.count("expert_count", 0, least=0)
        if bool(experts) != variant.experts:
            raise ModelError(
                f"{keys.source}: {keys.architecture}.expert_count = {experts} is not implemented "
                f"for architecture {keys.architecture!r}"
            )
        parameters = Hyperparameters(
            keys.count("block_count"), hidden, vocabulary, context,
            keys.count("feed_forward_length", 0 if experts else None, least=0), size,
            keys.count("rope.dimension_count", dim), keys.number("rope.freq_base", 10000.0), eps,
            Scaling.read(keys, context), experts,
            keys.count("expert_used_count", 0, least=0),
            keys.count("expert_feed_forward_length", 0, least=0),
        )  # fmt: skip
        parameters.check(keys)
        return parameters

    def check(self, keys: Keys) -> None:
        """ModelError where sizes contradict each other."""
        a = self.attention
        problems = {
            f"{a.heads} heads do not divide into {a.kv_heads} KV heads": a.heads % a.kv_heads,
            f"rope.dimension_count {self.rotated} of a head of {a.dim}": self.rotated > a.dim
            or self.rotated % 2,
            f"expert_used_count {self.experts_used} of {self.experts} experts": self.experts_used
            > self.experts
            or (self.experts and not (self.experts_used and self.expert_inner)),
            f"rope.freq_base {self.base} and norm epsilon {self.eps} must be positive": self.base
            <= 1
            or self.eps < 0,
        }
        for message, wrong in problems.items():
            if wrong:
                raise ModelError(f"{keys.source}: {message}: the metadata contradicts itself")


@dataclass(frozen=True)
class Decoder:
    """A model of this family: `graph(step)` is everything a step computes."""

    p: Hyperparameters
    w: Weights
    variant: Variant
    positions_per_token: ClassVar[int] = 1

    @property
    def layers(self) -> Layers:
        """KV heads and sizes, layer by layer."""
        a = self.p.attention
        return Layers(
            dict.fromkeys(range(self.p.layers), CacheLayer(a.kv_heads, a.dim, a.v_dim or a.dim))
        )

    def rotary(self) -> Rotary:
        """Frequencies, stretched as the file says."""
        factors = self.w.values("rope_freqs.weight", self.p.rotated // 2)
        return rotary(self.p.rotated, self.p.base, self.p.scaling, factors)

    def graph(self, step: Step) -> ops.Graph:
        """Logits [outputs, vocabulary] of the rows `step.output_rows`."""
        p, w = self.p, self.w
        rope = self.rotary()
        embedding = w("token_embd.weight", p.vocabulary, p.hidden)
        x = ops.get_rows(embedding, step.tokens, name="embedding")  # [T, hidden]
        frequencies = ops.constant("inv_freq", rope.inv_freq)
        angles = ops.rope_angles(step.positions, frequencies, magnitude=rope.magnitude)
        for i in range(p.layers):
            h = ops.rms_norm(x, w(f"blk.{i}.attn_norm.weight", p.hidden), eps=p.eps)
            x = ops.add(x, blocks.attention(w, step, i, h, angles, p.attention), name=f"blk.{i}.x")
            h = ops.rms_norm(x, w(f"blk.{i}.ffn_norm.weight", p.hidden), eps=p.eps)
            x = ops.add(x, self.ffn(i, h), name=f"blk.{i}.out")
        x = ops.select_rows(x, step.output_rows)  # [R, hidden]
        x = ops.rms_norm(x, w("output_norm.weight", p.hidden), eps=p.eps, name="output_norm")
        head = w.optional("output.weight", p.vocabulary, p.hidden)
        logits = ops.matmul(x, embedding if head is None else head, name="logits")
        return ops.Graph((logits,), "decoder")

    def ffn(self, layer: int, x: ops.Tensor) -> ops.Tensor:
        """The feed-forward part of a layer: one network, or the best of many."""
        p = self.p
        if not self.variant.experts:
            return blocks.swiglu_ffn(self.w, layer, x, p.inner)
        return blocks.moe_ffn(
            self.w, layer, x, p.experts, p.experts_used, p.expert_inner, normalize=True
        )
