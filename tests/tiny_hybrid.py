"""The smallest model with a recurrent layer and an attention layer, for tests of their memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from runtime import ops
from runtime.models.step import CacheLayer, Layers, StateLayer, Step, Weights

HIDDEN, VOCABULARY, HEADS, DIM, TAPS = 64, 80, 2, 16, 4
_RANDOM = np.random.default_rng(5)
_ROWS = {"qkv": 3 * HEADS * DIM, "decay": HEADS, "beta": HEADS}


def _matrix(*shape: int) -> np.ndarray:
    return (_RANDOM.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)


# tensors of the file besides those of a dense model
EXTRA = {f"blk.0.{name}.weight": _matrix(rows, HIDDEN) for name, rows in _ROWS.items()} | {
    "blk.0.conv.weight": _matrix(_ROWS["qkv"], TAPS),
    "blk.0.out.weight": _matrix(HIDDEN, HEADS * DIM),
}


class TinyHybrid:
    """Layer 0: gated delta rule after a short convolution. Layer 1: attention without positions."""

    positions_per_token = 4
    p = SimpleNamespace(vocabulary=VOCABULARY, context=256)
    layers = Layers(
        {1: CacheLayer(2, 32, 32)}, {0: StateLayer(TAPS, _ROWS["qkv"], HEADS, DIM, DIM)}
    )

    def __init__(self, file: Any) -> None:
        self.w = Weights(file.tensors, str(file.path))

    def graph(self, step: Step) -> ops.Graph:
        table = self.w("token_embd.weight", VOCABULARY, HIDDEN)
        x = ops.get_rows(table, step.tokens, name="embedding")
        x = ops.add(x, self.delta(step, x), name="x")
        x = ops.add(x, self.attention(step, x), name="y")
        norm = self.w("output_norm.weight", HIDDEN)
        x = ops.rms_norm(ops.select_rows(x, step.output_rows), norm, eps=1e-6, name="norm")
        return ops.Graph((ops.matmul(x, table, name="logits"),), "tiny")

    def delta(self, step: Step, x: ops.Tensor) -> ops.Tensor:
        memory = (step.runs, step.slot_in, step.slot_out)
        made = {n: ops.matmul(x, self.w(f"blk.0.{n}.weight", r, HIDDEN)) for n, r in _ROWS.items()}
        filters = self.w("blk.0.conv.weight", _ROWS["qkv"], TAPS)
        mixed = ops.silu(ops.short_conv(made["qkv"], filters, step.conv[0], *memory))
        each = HEADS * DIM
        q, k, v = (
            ops.split_heads(ops.slice_(mixed, axis=1, start=i * each, stop=(i + 1) * each), HEADS)
            for i in range(3)
        )
        y = ops.gated_delta(
            ops.l2_norm(q, eps=1e-6), ops.l2_norm(k, eps=1e-6), v,
            ops.scale(ops.softplus(made["decay"]), factor=-0.02), ops.sigmoid(made["beta"]),
            step.delta[0], *memory, scale=DIM**-0.5, order="grouped",
        )  # fmt: skip
        return ops.matmul(ops.merge_heads(y), self.w("blk.0.out.weight", HIDDEN, each))

    def attention(self, step: Step, x: ops.Tensor) -> ops.Tensor:
        def heads(name: str, n: int) -> ops.Tensor:
            matrix = self.w(f"blk.1.attn_{name}.weight", n * 32, HIDDEN)
            return ops.split_heads(ops.matmul(x, matrix), n)

        keys, values = step.k[1], step.v[1]
        keys = ops.kv_write(heads("k", 2), keys, step.slots, which="k", kv=keys.dtype.name)
        values = ops.kv_write(heads("v", 2), values, step.slots, which="v", kv=values.dtype.name)
        y = ops.attention(
            heads("q", 4), keys, values, step.table, step.sequences, step.places, scale=32**-0.5
        )
        return ops.matmul(ops.merge_heads(y), self.w("blk.1.attn_output.weight", HIDDEN, 128))
