"""gpt-oss (OpenAI 2025): attention with sinks, a sliding window in every other layer, experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from runtime import ops
from runtime.errors import ModelError
from runtime.models import blocks
from runtime.models.experts import SOFTMAX_OF_CHOSEN, Experts, moe_ffn
from runtime.models.keys import Keys
from runtime.models.rotary import RotarySizes
from runtime.models.step import Layers, Step
from runtime.models.weights import Weights

LIMIT = 7.0  # of the clamped SwiGLU, not in the files
PERIOD = 2  # of sliding and full layers, where a file does not say


class Hyperparameters(NamedTuple):
    """Sizes and constants of one model, as its file gives them."""

    sliding: tuple[bool, ...]
    hidden: int
    vocabulary: int
    context: int
    window: int
    eps: float
    attention: blocks.AttentionSizes
    rotary: RotarySizes
    rotary_sliding: RotarySizes  # of the layers with a window
    experts: Experts

    @staticmethod
    def read(keys: Keys, w: Weights, vocabulary: int) -> Hyperparameters:
        """From metadata; ModelError for what is missing, contradictory or not implemented."""
        hidden, context = keys.count("embedding_length"), keys.count("context_length")
        eps = keys.norm_eps()
        size = blocks.AttentionSizes.read(keys, hidden, eps, sinks=True)
        # Files have no key for it: OpenAI's YaRN does not round its range of dimensions. A model
        # with a base of its own for sliding layers is somebody else's, with YaRN as it is usual.
        derived = keys.has("rope.freq_base_swa")
        # Ollama's files leave out the kind of scaling, which theirs means; others mean the usual.
        kind = "yarn" if keys.architecture == "gptoss" else "linear"
        rotary = RotarySizes.read(keys, size.dim, context, truncate=derived, kind=kind)
        return Hyperparameters(
            _sliding_layers(keys), hidden, vocabulary, context,
            keys.count("attention.sliding_window"), eps, size,
            rotary, rotary._replace(base=keys.number("rope.freq_base_swa", rotary.base)),
            Experts.read(keys, w, SOFTMAX_OF_CHOSEN, LIMIT, interleaved=True),
        )  # fmt: skip

    @property
    def layers(self) -> int:
        """Layers of a step."""
        return len(self.sliding)


@dataclass(frozen=True)
class GptOss:
    """A model of this family: `graph(step)` is everything a step computes."""

    p: Hyperparameters
    w: Weights

    @staticmethod
    def read(keys: Keys, w: Weights, vocabulary: int) -> GptOss:
        """The model of a file."""
        return GptOss(Hyperparameters.read(keys, w, vocabulary), w)

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
        angles = near = blocks.angles(w, step, p.rotary)
        if p.rotary_sliding != p.rotary:
            near = blocks.angles(w, step, p.rotary_sliding, "inv_freq_sliding")
        for i, sliding in enumerate(p.sliding):
            at, size = f"blk.{i}", p.attention._replace(window=p.window if sliding else 0)
            h = ops.rms_norm(x, w(f"{at}.attn_norm.weight", p.hidden), eps=p.eps)
            mixed = blocks.attention(w, step, i, h, near if sliding else angles, size)
            x = ops.add(x, mixed, name=f"{at}.x")
            h = ops.rms_norm(x, w(f"{at}.post_attention_norm.weight", p.hidden), eps=p.eps)
            x = ops.add(x, moe_ffn(w, i, h, p.experts), name=f"{at}.out")
        return ops.Graph((blocks.logits(w, step, x, embeddings, p.eps),), "gpt-oss")


def _sliding_layers(keys: Keys) -> tuple[bool, ...]:
    """Which layers see a window alone: the first of two, unless the file has its own pattern."""
    layers = keys.layers()
    listed = keys.counts("attention.sliding_window_pattern", PERIOD)
    if len(listed) == 1:  # every so many layers, the last of them sees all
        return tuple(i % listed[0] < listed[0] - 1 if listed[0] else True for i in range(layers))
    if len(listed) < layers:
        raise ModelError(
            f"{keys.source}: attention.sliding_window_pattern has {len(listed)} entries, "
            f"not {layers}"
        )
    return tuple(map(bool, listed[:layers]))
