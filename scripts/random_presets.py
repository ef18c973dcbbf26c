"""Which tensors the models of `make_random_model.py` have: sizes and names of the real models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Experts:
    """`used` of `count` networks of `inner` units, and a shared one of `shared`."""

    count: int
    used: int
    inner: int
    shared: int = 0


@dataclass(frozen=True)
class Delta:
    """Delta-net layers: heads of queries and keys, of values, their size, taps, and how often
    attention takes their place."""

    key_heads: int
    heads: int
    dim: int = 128
    taps: int = 4
    interval: int = 4


@dataclass(frozen=True)
class Preset:
    """Hyperparameters of one model, and which function lists its tensors.

    `mtp`: with a block behind the layers that predicts one token more. `more`: further metadata
    keys, under the architecture's prefix.
    """

    architecture: str
    tensors: Callable[[Preset], list[Slot]]
    layers: int
    hidden: int
    ff: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    rope_base: float
    epsilon: float
    tied: bool = True
    llama3_rope: bool = False
    rotated: int = 0
    experts: Experts | None = None
    delta: Delta | None = None
    mtp: bool = False
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Slot:
    """A tensor of the model; `role` decides its values."""

    name: str
    shape: tuple[int, ...]
    role: str  # norm, matrix, output, rope, router, small, bias, decay, pace


Row = tuple[str, tuple[int, ...], str]  # name inside a layer, shape, role


def head_tensors(p: Preset) -> list[Slot]:
    """What stands before the layers, in the converter's order."""
    slots = [Slot("token_embd.weight", (p.vocab, p.hidden), "output" if p.tied else "matrix")]
    if not p.tied:
        slots.append(Slot("output.weight", (p.vocab, p.hidden), "output"))
    slots.append(Slot("output_norm.weight", (p.hidden,), "norm"))
    if p.llama3_rope:
        slots.append(Slot("rope_freqs.weight", (p.head_dim // 2,), "rope"))
    return slots


def attention_rows(p: Preset, gated: bool = False) -> list[Row]:
    """Projections of an attention layer; a gate lies behind each head's query."""
    q, kv = p.heads * p.head_dim, p.kv_heads * p.head_dim
    return [
        ("attn_q.weight", (2 * q if gated else q, p.hidden), "matrix"),
        ("attn_k.weight", (kv, p.hidden), "matrix"),
        ("attn_v.weight", (kv, p.hidden), "matrix"),
        ("attn_output.weight", (p.hidden, q), "matrix"),
    ]


def head_norm_rows(p: Preset) -> list[Row]:
    """Norms of queries and keys."""
    return [(f"attn_{x}_norm.weight", (p.head_dim,), "norm") for x in "qk"]


def ffn_rows(p: Preset) -> list[Row]:
    """The feed-forward network."""
    return [
        ("ffn_gate.weight", (p.ff, p.hidden), "matrix"),
        ("ffn_up.weight", (p.ff, p.hidden), "matrix"),
        ("ffn_down.weight", (p.hidden, p.ff), "matrix"),
    ]


def expert_rows(p: Preset, e: Experts) -> list[Row]:
    """The experts, their router, and the shared one with its gate."""
    rows: list[Row] = [
        ("ffn_gate_inp.weight", (e.count, p.hidden), "router"),
        ("ffn_gate_exps.weight", (e.count, e.inner, p.hidden), "matrix"),
        ("ffn_up_exps.weight", (e.count, e.inner, p.hidden), "matrix"),
        ("ffn_down_exps.weight", (e.count, p.hidden, e.inner), "matrix"),
    ]
    if e.shared:
        rows += [
            ("ffn_gate_inp_shexp.weight", (p.hidden,), "router"),
            ("ffn_gate_shexp.weight", (e.shared, p.hidden), "matrix"),
            ("ffn_up_shexp.weight", (e.shared, p.hidden), "matrix"),
            ("ffn_down_shexp.weight", (p.hidden, e.shared), "matrix"),
        ]
    return rows


def delta_rows(p: Preset, d: Delta) -> list[Row]:
    """A delta-net layer; Qwen3-Next has one projection for alpha and beta."""
    values = d.heads * d.dim
    channels = 2 * d.key_heads * d.dim + values
    gates = {"ssm_ba": 2 * d.heads}
    if p.architecture != "qwen3next":
        gates = {"ssm_alpha": d.heads, "ssm_beta": d.heads}
    return [
        ("attn_qkv.weight", (channels, p.hidden), "matrix"),
        ("attn_gate.weight", (values, p.hidden), "matrix"),
        ("ssm_conv1d.weight", (channels, d.taps), "small"),
        ("ssm_dt.bias", (d.heads,), "pace"),
        ("ssm_a", (d.heads,), "decay"),
        *((f"{name}.weight", (rows, p.hidden), "matrix") for name, rows in gates.items()),
        ("ssm_norm.weight", (d.dim,), "norm"),
        ("ssm_out.weight", (p.hidden, values), "matrix"),
    ]


def transformer_tensors(p: Preset) -> list[Slot]:
    """Llama and Qwen 3 tensors, in the converter's order."""
    norms: list[Row] = [(f"{x}_norm.weight", (p.hidden,), "norm") for x in ("attn", "ffn")]
    rows = [norms[0], *attention_rows(p), norms[1], *ffn_rows(p)]
    if p.architecture == "qwen3":
        rows += head_norm_rows(p)
    return [*head_tensors(p), *layer_slots(rows, range(p.layers))]


def hybrid_tensors(p: Preset) -> list[Slot]:
    """Qwen3-Next and Qwen3.5: delta-net layers, attention in every fourth."""
    assert p.delta, "a hybrid preset has delta-net sizes"
    slots = head_tensors(p)
    for layer in range(p.layers):
        recurrent = (layer + 1) % p.delta.interval != 0
        attention = [*attention_rows(p, gated=True), *head_norm_rows(p)]
        rows: list[Row] = [
            ("attn_norm.weight", (p.hidden,), "norm"),
            *(delta_rows(p, p.delta) if recurrent else attention),
            ("post_attention_norm.weight", (p.hidden,), "norm"),
            *(expert_rows(p, p.experts) if p.experts else ffn_rows(p)),
        ]
        slots += layer_slots(rows, (layer,))
    return slots + (layer_slots(mtp_rows(p), (p.layers,)) if p.mtp else [])


def mtp_rows(p: Preset) -> list[Row]:
    """The block behind the layers of a hybrid model that predicts one token more (NextN)."""
    return [
        ("attn_norm.weight", (p.hidden,), "norm"),
        *attention_rows(p, gated=True),
        *head_norm_rows(p),
        ("post_attention_norm.weight", (p.hidden,), "norm"),
        *(expert_rows(p, p.experts) if p.experts else ffn_rows(p)),
        ("nextn.eh_proj.weight", (p.hidden, 2 * p.hidden), "matrix"),
        *((f"nextn.{x}norm.weight", (p.hidden,), "norm") for x in ("e", "h", "shared_head_")),
    ]


def gpt_oss_tensors(p: Preset) -> list[Slot]:
    """gpt-oss: biases everywhere, a sink per head."""
    assert p.experts, "a gpt-oss preset has experts"
    rows: list[Row] = [
        ("attn_norm.weight", (p.hidden,), "norm"),
        ("attn_sinks.weight", (p.heads,), "bias"),
        ("post_attention_norm.weight", (p.hidden,), "norm"),
    ]
    for name, shape, role in (*attention_rows(p), *expert_rows(p, p.experts)):
        bias = name.replace(".weight", ".bias"), shape[:-1], "bias"
        rows += [(name, shape, role), bias]
    return [*head_tensors(p), *layer_slots(rows, range(p.layers))]


def layer_slots(rows: list[Row], layers: range | tuple[int, ...]) -> list[Slot]:
    """The same rows in each of some layers."""
    return [Slot(f"blk.{i}.{name}", shape, role) for i in layers for name, shape, role in rows]


_SECTIONS = {"rope.dimension_sections": [11, 11, 10, 0]}
_YARN = {
    "rope.scaling.type": "yarn", "rope.scaling.factor": 32.0,
    "rope.scaling.original_context_length": 4096, "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0, "attention.sliding_window": 128,
}  # fmt: skip

PRESETS = {
    "qwen3-0.6b": Preset(
        "qwen3", transformer_tensors, layers=28, hidden=1024, ff=3072, heads=16, kv_heads=8,
        head_dim=128, vocab=151_936, context=40_960, rope_base=1e6, epsilon=1e-6,
    ),
    "llama-1b": Preset(
        "llama", transformer_tensors, layers=16, hidden=2048, ff=8192, heads=32, kv_heads=8,
        head_dim=64, vocab=128_256, context=131_072, rope_base=5e5, epsilon=1e-5, llama3_rope=True,
    ),
    "qwen3-4b": Preset(
        "qwen3", transformer_tensors, layers=36, hidden=2560, ff=9728, heads=32, kv_heads=8,
        head_dim=128, vocab=151_936, context=40_960, rope_base=1e6, epsilon=1e-6,
    ),
    "llama-8b": Preset(
        "llama", transformer_tensors, layers=32, hidden=4096, ff=14_336, heads=32, kv_heads=8,
        head_dim=128, vocab=128_256, context=131_072, rope_base=5e5, epsilon=1e-5, tied=False,
        llama3_rope=True,
    ),
    "qwen35-0.8b": Preset(
        "qwen35", hybrid_tensors, layers=24, hidden=1024, ff=3584, heads=8, kv_heads=2,
        head_dim=256, vocab=248_320, context=262_144, rope_base=1e7, epsilon=1e-6, rotated=64,
        delta=Delta(16, 16), more=_SECTIONS,
    ),
    "qwen35moe-mini": Preset(
        "qwen35moe", hybrid_tensors, layers=12, hidden=1024, ff=0, heads=8, kv_heads=2,
        head_dim=256, vocab=248_320, context=262_144, rope_base=1e7, epsilon=1e-6, rotated=64,
        delta=Delta(16, 32), experts=Experts(64, 8, 512, 512), more=_SECTIONS,
    ),
    "qwen35moe-35b": Preset(
        "qwen35moe", hybrid_tensors, layers=40, hidden=2048, ff=0, heads=16, kv_heads=2,
        head_dim=256, vocab=248_320, context=262_144, rope_base=1e7, epsilon=1e-6, rotated=64,
        tied=False, delta=Delta(16, 32), experts=Experts(256, 8, 512, 512), more=_SECTIONS,
    ),
    "qwen3next-mini": Preset(
        "qwen3next", hybrid_tensors, layers=12, hidden=1024, ff=0, heads=8, kv_heads=2,
        head_dim=256, vocab=151_936, context=262_144, rope_base=1e7, epsilon=1e-6, rotated=64,
        delta=Delta(16, 32), experts=Experts(64, 10, 512, 512), tied=False,
    ),
    "qwen3next-80b": Preset(
        "qwen3next", hybrid_tensors, layers=48, hidden=2048, ff=5120, heads=16, kv_heads=2,
        head_dim=256, vocab=151_936, context=262_144, rope_base=1e7, epsilon=1e-6, rotated=64,
        delta=Delta(16, 32), experts=Experts(512, 10, 512, 512), tied=False,
    ),
    "gpt-oss-mini": Preset(
        "gpt-oss", gpt_oss_tensors, layers=12, hidden=1024, ff=0, heads=16, kv_heads=2,
        head_dim=64, vocab=201_088, context=131_072, rope_base=150_000.0, epsilon=1e-5,
        experts=Experts(32, 4, 1024), tied=False, more=_YARN,
    ),
}  # fmt: skip
