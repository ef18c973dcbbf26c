"""Decoder-only transformers: RMS norm, grouped-query attention with RoPE, SwiGLU or experts.

Llama (Touvron et al. 2023) and its relatives; what differs between them is a row of the registry:
rope style, norms on queries and keys, experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

from runtime import ops
from runtime.models import blocks
from runtime.models.experts import Experts, moe_ffn
from runtime.models.keys import Keys
from runtime.models.rotary import RotarySizes
from runtime.models.step import Layers, Step
from runtime.models.weights import Weights


class Variant(NamedTuple):
    """What an architecture of this family does differently."""

    rope_style: str = "neox"
    qk_norm: bool = False
    experts: bool = False
    output_bias: bool = False


class Hyperparameters(NamedTuple):
    """Sizes and constants of one model, as its file gives them."""

    layers: int
    hidden: int
    vocabulary: int
    context: int
    intermediate: int
    eps: float
    attention: blocks.AttentionSizes
    rotary: RotarySizes
    experts: Experts | None
    output_bias: bool

    @staticmethod
    def read(keys: Keys, w: Weights, vocabulary: int, variant: Variant) -> Hyperparameters:
        """From metadata; ModelError for what is missing, contradictory or not implemented."""
        hidden, context = keys.count("embedding_length"), keys.count("context_length")
        eps = keys.norm_eps()
        size = blocks.AttentionSizes.read(keys, hidden, eps, variant.rope_style, variant.qk_norm)
        if not variant.experts:
            keys.refuse_experts()
        return Hyperparameters(
            keys.layers(), hidden, vocabulary, context,
            keys.count("feed_forward_length", 0 if variant.experts else None, least=0), eps, size,
            RotarySizes.read(keys, size.dim, context),
            Experts.read(keys, w) if variant.experts else None, variant.output_bias,
        )  # fmt: skip


@dataclass(frozen=True)
class Decoder:
    """A model of this family: `graph(step)` is everything a step computes."""

    p: Hyperparameters
    w: Weights

    @classmethod
    def read(cls, keys: Keys, w: Weights, vocabulary: int, variant: Variant) -> Self:
        """The model of a file."""
        return cls(Hyperparameters.read(keys, w, vocabulary, variant), w)

    @property
    def positions_per_token(self) -> int:
        """Four with M-RoPE, else one."""
        return self.p.rotary.positions_per_token

    @property
    def layers(self) -> Layers:
        """KV heads and sizes, layer by layer."""
        return Layers(dict.fromkeys(range(self.p.layers), self.p.attention.cache))

    def graph(self, step: Step) -> ops.Graph:
        """Logits [outputs, vocabulary] of the rows `step.output_rows`."""
        p, w = self.p, self.w
        embeddings, x = blocks.embedding(w, step, p.vocabulary, p.hidden)  # [T, hidden]
        angles = blocks.angles(w, step, p.rotary)
        for i in range(p.layers):
            h = ops.rms_norm(x, w(f"blk.{i}.attn_norm.weight", p.hidden), eps=p.eps)
            x = ops.add(x, blocks.attention(w, step, i, h, angles, p.attention), name=f"blk.{i}.x")
            h = ops.rms_norm(x, w(f"blk.{i}.ffn_norm.weight", p.hidden), eps=p.eps)
            x = ops.add(x, self.ffn(i, h), name=f"blk.{i}.out")
        return ops.Graph((blocks.logits(w, step, x, embeddings, p.eps, p.output_bias),), "decoder")

    def ffn(self, layer: int, x: ops.Tensor) -> ops.Tensor:
        """The feed-forward part of a layer: one network, or the best of many."""
        if self.p.experts is None:
            return blocks.swiglu_ffn(self.w, layer, x, self.p.intermediate)
        return moe_ffn(self.w, layer, x, self.p.experts)
