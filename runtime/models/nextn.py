"""The block behind the layers of a model that predicts one token more than they do (NextN, MTP).

It takes the embedding of a token and the hidden row of the one before it, whose logits the token
was chosen from, and has one layer of attention and a feed-forward network of its own (DeepSeek-AI
2024). What its attention keeps of a token is written by the step that evaluates the token, so it
is there for all that a sequence has; the block itself runs when it is asked for drafts. Its own
hidden row stands for the model's where several are drafted. T: tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from runtime import ops
from runtime.errors import ModelError
from runtime.models import blocks
from runtime.models.linear import scaled
from runtime.models.rotary import RotarySizes
from runtime.models.step import CacheLayer, StateLayer, Step
from runtime.models.weights import Weights
from runtime.ops.tensor import Tensor

_PARTS = ("eh_proj", "enorm", "hnorm", "shared_head_head", "shared_head_norm", "embed_tokens")
_ALSO = (".scale", ".input_scale")  # beside a matrix


@dataclass(frozen=True)
class NextN:
    """The block of number `layer` of a file. ffn: its network, (layer, x) -> y."""

    w: Weights
    layer: int
    hidden: int
    vocabulary: int
    eps: float
    attention: blocks.AttentionSizes
    rotary: RotarySizes
    ffn: Callable[[int, Tensor], Tensor]

    @property
    def cache(self) -> CacheLayer:
        """What its attention keeps of a token."""
        return self.attention.cache._replace(whole=True)

    @property
    def state(self) -> StateLayer:
        """What a step leaves for the next one: the last hidden row of a sequence."""
        return StateLayer(2, self.hidden, 0, 0, 0)

    def check(self, blocks_behind: int) -> None:
        """ModelError unless it has a form that is known here."""
        at, source = f"blk.{self.layer}.nextn.", self.w.source
        if blocks_behind != 1:
            raise ModelError(
                f"{source}: {blocks_behind} blocks behind the layers predict further tokens; "
                "one is implemented"
            )
        named = [n.removeprefix(at) for n in self.w.tensors if n.startswith(at)]
        known = {f"{part}{tail}" for part in _PARTS for tail in (".weight", *_ALSO)}
        if strange := sorted({*named} - known):
            raise ModelError(
                f"{source}: tensor {at + strange[0]!r} is of no part of a NextN block that is "
                "known here"
            )

    def remembered(self, step: Step, x: Tensor, rows: Tensor, angles: Tensor) -> tuple[Tensor, ...]:
        """The writes that a step does for it. x: embeddings, rows: hidden rows, [T, hidden] both.

        Each token goes with the row before it, the first of a step with what the last step left.
        """
        shift = np.repeat(np.array([[1, 0]], np.float32), self.hidden, 0)
        before = ops.short_conv(
            rows, ops.constant("row_before", shift), step.conv[self.layer], step.spans,
            step.slot_in, step.slot_out, name=f"blk.{self.layer}.before",
        )  # fmt: skip
        x = self._joined(self._embedding(step, x), before)
        return blocks.cached(self.w, step, self.layer, self._normed(x), angles, self.attention)

    def drafts(
        self, steps: Sequence[Step], rows: Tensor
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """For each step the likeliest token behind the step's of T sequences, int32 [T, 1].

        And how likely each is, [T, 1], and the block's rows behind the last, [T, hidden]. The first
        step has its tokens, each other one those that the step before it made. rows: the hidden
        rows before the first, [T, hidden].
        """
        tokens, found, shares = steps[0].tokens, list[Tensor](), list[Tensor]()
        for step in steps:
            step = step._replace(tokens=tokens)
            rows = self._rows(step, rows)
            scores = self._scores(rows)
            found.append(ops.top_k(scores, k=1, name=f"blk.{self.layer}.drafted"))
            shares.append(ops.take(ops.softmax(scores), found[-1]))
            tokens = ops.reshape(found[-1], shape=(scores.shape[0],))
        return found, shares, rows

    def _rows(self, step: Step, before: Tensor) -> Tensor:
        """The block's own hidden rows, [T, hidden]."""
        w, at = self.w, f"blk.{self.layer}"
        angles = blocks.angles(w, step, self.rotary)
        x = self._joined(self._embedding(step), before)
        mixed = blocks.attention(w, step, self.layer, self._normed(x), angles, self.attention)
        x = ops.add(x, mixed, name=f"{at}.x")
        h = ops.rms_norm(x, w(f"{at}.post_attention_norm.weight", self.hidden), eps=self.eps)
        x = ops.add(x, self.ffn(self.layer, h), name=f"{at}.out")
        own = f"{at}.nextn.shared_head_norm.weight"
        norm = w(own if own in w else "output_norm.weight", self.hidden)
        return ops.rms_norm(x, norm, eps=self.eps, name=f"{at}.head_norm")

    def _scores(self, rows: Tensor) -> Tensor:
        w, own, shape = (
            self.w,
            f"blk.{self.layer}.nextn.shared_head_head",
            (self.vocabulary, self.hidden),
        )
        name = next((n for n in (own, "output") if f"{n}.weight" in w), "token_embd")
        y = ops.matmul(rows, w(f"{name}.weight", *shape), name=f"blk.{self.layer}.logits")
        return y if name == "token_embd" else scaled(w, name, y)

    def _embedding(self, step: Step, x: Tensor | None = None) -> Tensor:
        """Of the step's tokens; x: the model's, where the block has none of its own."""
        own = f"blk.{self.layer}.nextn.embed_tokens.weight"
        if x is not None and own not in self.w:
            return x
        name = own if own in self.w else "token_embd.weight"
        return blocks.embedding(self.w, step, self.vocabulary, self.hidden, name)[1]

    def _joined(self, x: Tensor, before: Tensor) -> Tensor:
        """The normed embedding and the normed row before it, side by side, times one matrix."""
        w, at = self.w, f"blk.{self.layer}.nextn"
        e = ops.rms_norm(x, w(f"{at}.enorm.weight", self.hidden), eps=self.eps, name=f"{at}.e")
        h = ops.rms_norm(before, w(f"{at}.hnorm.weight", self.hidden), eps=self.eps, name=f"{at}.h")
        found = []
        for part, half, first in (("embedding", e, 0), ("hidden", h, self.hidden)):
            matrix = w.columns(
                f"{at}.eh_proj.weight", part, (first, first + self.hidden),
                self.hidden, 2 * self.hidden,
            )  # fmt: skip
            found.append(scaled(w, f"{at}.eh_proj", ops.matmul(half, matrix, name=f"{at}.{part}")))
        return ops.add(*found, name=f"{at}.joined")

    def _normed(self, x: Tensor) -> Tensor:
        weight = self.w(f"blk.{self.layer}.attn_norm.weight", self.hidden)
        return ops.rms_norm(x, weight, eps=self.eps, name=f"blk.{self.layer}.attn_norm")
