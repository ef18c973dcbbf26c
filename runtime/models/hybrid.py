"""Hybrid decoders: gated delta-net layers with a gated full-attention layer now and then.

Qwen3-Next (Qwen team 2025), Qwen3.5 and what uses their layers; what differs between them is a row
of the registry: the order of the value heads, experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from runtime import ops
from runtime.models import blocks
from runtime.models.delta import DeltaSizes, delta_net
from runtime.models.experts import Experts, moe_ffn
from runtime.models.keys import Keys
from runtime.models.nextn import NextN
from runtime.models.recurrence import recurrent_layers
from runtime.models.rotary import RotarySizes
from runtime.models.step import Layers, Step
from runtime.models.weights import Weights


class Variant(NamedTuple):
    """What an architecture of this family does differently."""

    order: str  # of the value heads
    experts: bool = False


class Hyperparameters(NamedTuple):
    """Sizes and constants of one model, as its file gives them.

    recurrent: which of the layers are delta-net layers. stored: all blocks of the file; those
    behind the layers predict further tokens (NextN) and take no part in a step.
    """

    recurrent: tuple[bool, ...]
    stored: int
    hidden: int
    vocabulary: int
    context: int
    intermediate: int
    eps: float
    attention: blocks.AttentionSizes
    rotary: RotarySizes
    delta: DeltaSizes
    experts: Experts | None

    @staticmethod
    def read(keys: Keys, w: Weights, vocabulary: int, variant: Variant) -> Hyperparameters:
        """From metadata; ModelError for what is missing, contradictory or not implemented."""
        eps = keys.norm_eps()
        count, hidden = keys.count("block_count"), keys.count("embedding_length")
        context = keys.count("context_length")
        size = blocks.AttentionSizes.read(keys, hidden, eps, qk_norm=True, gated=True, holes=True)
        if not variant.experts:
            keys.refuse_experts()
        return Hyperparameters(
            recurrent_layers(keys, w, keys.layers()), count, hidden, vocabulary, context,
            keys.count("feed_forward_length", 0, least=0), eps, size,
            RotarySizes.read(keys, size.dim, context), DeltaSizes.read(keys, eps, variant.order),
            Experts.read(keys, w) if variant.experts else None,
        )  # fmt: skip

    @property
    def layers(self) -> int:
        """Layers of a step."""
        return len(self.recurrent)


@dataclass(frozen=True)
class Hybrid:
    """A model of this family: `graph(step)` is everything a step computes."""

    p: Hyperparameters
    w: Weights
    predictor: NextN | None = None

    @staticmethod
    def read(keys: Keys, w: Weights, vocabulary: int, variant: Variant) -> Hybrid:
        """The model of a file."""
        model = Hybrid(Hyperparameters.read(keys, w, vocabulary, variant), w)
        for layer in model.layers.recurrent:  # before memory of these sizes is asked for
            model.p.delta.check(w, layer)
        return model

    @property
    def positions_per_token(self) -> int:
        """Four with M-RoPE, else one."""
        return self.p.rotary.positions_per_token

    @property
    def layers(self) -> Layers:
        """What each layer remembers: keys and values, or a recurrent state."""
        kinds = dict(enumerate(self.p.recurrent))
        caches = {i: self.p.attention.cache for i, recurrent in kinds.items() if not recurrent}
        states = {i: self.p.delta.state for i, recurrent in kinds.items() if recurrent}
        if (further := self.predictor) is not None:
            caches, states = (
                caches | {further.layer: further.cache},
                states | {further.layer: further.state},
            )
        return Layers(caches, states)

    def predicting(self) -> Hybrid:
        """With the block that predicts further tokens; ModelError where the file's is not known."""
        p = self.p
        further = NextN(
            self.w, p.layers, p.hidden, p.vocabulary, p.eps, p.attention, p.rotary, self.ffn
        )
        further.check(p.stored - p.layers)
        return replace(self, predictor=further)

    @property
    def nextn(self) -> Mapping[str, Any]:
        """The file's tensors of the blocks behind the layers, by name."""
        ahead = tuple(f"blk.{i}." for i in range(self.p.layers, self.p.stored))
        return {name: t for name, t in self.w.tensors.items() if name.startswith(ahead)}

    def graph(self, step: Step) -> ops.Graph:
        """Logits [outputs, vocabulary] of the rows `step.output_rows`.

        With a predictor also the rows that logits are made of, [outputs, hidden], and its writes.
        """
        p, w = self.p, self.w
        embeddings, first = blocks.embedding(w, step, p.vocabulary, p.hidden)  # [T, hidden]
        x = first
        angles = blocks.angles(w, step, p.rotary)
        for i, recurrent in enumerate(p.recurrent):
            at = f"blk.{i}"
            h = ops.rms_norm(x, w(f"{at}.attn_norm.weight", p.hidden), eps=p.eps)
            if recurrent:
                mixed = delta_net(w, step, i, h, p.delta)
            else:
                mixed = blocks.attention(w, step, i, h, angles, p.attention)
            x = ops.add(x, mixed, name=f"{at}.x")
            h = ops.rms_norm(x, w(f"{at}.post_attention_norm.weight", p.hidden), eps=p.eps)
            x = ops.add(x, self.ffn(i, h), name=f"{at}.out")
        logits = blocks.logits(w, step, x, embeddings, p.eps)
        if (further := self.predictor) is None:
            return ops.Graph((logits,), "hybrid")
        rows = ops.rms_norm(x, w("output_norm.weight", p.hidden), eps=p.eps, name="hidden")
        writes = further.remembered(step, first, rows, angles)
        return ops.Graph((logits, ops.select_rows(rows, step.output_rows), *writes), "hybrid")

    def ffn(self, layer: int, x: ops.Tensor) -> ops.Tensor:
        """One network, or the best of many; a model with experts may have layers without."""
        if self.p.experts is None or f"blk.{layer}.ffn_gate.weight" in self.w:
            return blocks.swiglu_ffn(self.w, layer, x, self.p.intermediate)
        return moe_ffn(self.w, layer, x, self.p.experts)
