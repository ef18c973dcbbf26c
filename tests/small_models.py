"""Small random models written as GGUF, for tests that stand without golden data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_TYPES = gguf.GGMLQuantizationType


@dataclass(frozen=True)
class Sizes:
    """Sizes of a small model; `experts` > 0 makes it a mixture."""

    architecture: str = "qwen3"
    layers: int = 2
    hidden: int = 64
    inner: int = 96
    heads: int = 4
    kv_heads: int = 2
    dim: int = 32
    vocabulary: int = 80
    context: int = 256
    experts: int = 0
    used: int = 2


def tensors(size: Sizes, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 tensors by GGUF name, outermost axis first."""
    rng = np.random.default_rng(seed)

    def w(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)

    def norm(n: int) -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(n)).astype(np.float32)

    q, kv = size.heads * size.dim, size.kv_heads * size.dim
    # Without random signs a tied model mostly repeats its last token.
    signs = np.sign(rng.standard_normal(size.hidden)).astype(np.float32)
    found = {
        "token_embd.weight": w(size.vocabulary, size.hidden) * 8,
        "output_norm.weight": norm(size.hidden) * signs,
    }
    for i in range(size.layers):
        at = f"blk.{i}."
        found |= {
            at + "attn_norm.weight": norm(size.hidden), at + "attn_q.weight": w(q, size.hidden),
            at + "attn_k.weight": w(kv, size.hidden), at + "attn_v.weight": w(kv, size.hidden),
            at + "attn_output.weight": w(size.hidden, q), at + "ffn_norm.weight": norm(size.hidden),
        }  # fmt: skip
        if size.architecture.startswith("qwen3"):
            found |= {at + "attn_q_norm.weight": norm(size.dim)}
            found |= {at + "attn_k_norm.weight": norm(size.dim)}
        lead = (size.experts,) if size.experts else ()
        tail = "_exps" if size.experts else ""
        if size.experts:
            found[at + "ffn_gate_inp.weight"] = w(size.experts, size.hidden)
        found |= {
            f"{at}ffn_gate{tail}.weight": w(*lead, size.inner, size.hidden),
            f"{at}ffn_up{tail}.weight": w(*lead, size.inner, size.hidden),
            f"{at}ffn_down{tail}.weight": w(*lead, size.hidden, size.inner),
        }
    return found


def metadata(size: Sizes) -> dict[str, Any]:
    """Hyperparameters under the architecture's prefix."""
    found = {
        "block_count": size.layers, "context_length": size.context,
        "embedding_length": size.hidden, "feed_forward_length": size.inner,
        "attention.head_count": size.heads, "attention.head_count_kv": size.kv_heads,
        "attention.key_length": size.dim, "attention.value_length": size.dim,
        "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 10000.0,
    }  # fmt: skip
    if size.experts:
        found |= {
            "expert_count": size.experts, "expert_used_count": size.used,
            "expert_feed_forward_length": size.inner,
        }  # fmt: skip
    return found


def write_model(
    path: Path, size: Sizes | None = None, kind: str = "F32", extra: dict[str, Any] | None = None,
    without: tuple[str, ...] = (), replace: dict[str, np.ndarray] | None = None,
) -> Path:  # fmt: skip
    """Write a model with matrices of type `kind`; `extra` overrides metadata keys."""
    size = size or Sizes()
    writer = gguf.GGUFWriter(path, size.architecture)
    for key, value in {**metadata(size), **(extra or {})}.items():
        name = key if "." in key and key.split(".")[0] in ("general", "tokenizer") else ""
        _add(writer, name or f"{size.architecture}.{key}", value)
    _add(writer, "tokenizer.ggml.model", "none")
    for name, values in {**tensors(size), **(replace or {})}.items():
        if name in without:
            continue
        quantise = kind != "F32" and values.ndim > 1 and "gate_inp" not in name
        if quantise:
            raw = gguf.quants.quantize(values, _TYPES[kind])
            writer.add_tensor(name, raw, raw_dtype=_TYPES[kind])
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    if isinstance(value, str):
        writer.add_string(key, value)
    else:
        kinds[type(value)](key, value)
