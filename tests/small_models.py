"""Small random models written as GGUF, for tests that stand without golden data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_TYPES = gguf.GGMLQuantizationType


HYBRID = ("qwen35", "qwen35moe", "qwen3next")


@dataclass(frozen=True)
class Sizes:
    """Sizes of a small model; `experts` > 0 makes it a mixture.

    Of hybrid models `interval`, `key_heads` and what follows: every `interval`th layer has
    attention, the others a recurrent state; `fused` is the older layout of qwen3next.
    """

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
    interval: int = 2
    key_heads: int = 2
    value_heads: int = 4
    k_dim: int = 16
    v_dim: int = 32
    taps: int = 4
    fused: bool = False
    further: bool = False  # a block behind the layers predicts one token more

    @property
    def hybrid(self) -> bool:
        return self.architecture in HYBRID

    def recurrent(self, layer: int) -> bool:
        """Whether a layer has a recurrent state in place of a cache."""
        return self.hybrid and (layer + 1) % self.interval != 0


# One of each architecture beyond the plain decoders, smaller than the default where it is slow.
NOVEL = {
    "qwen35": Sizes("qwen35", layers=3),
    "qwen35moe": Sizes("qwen35moe", layers=3, experts=6, inner=32),
    "qwen3next": Sizes("qwen3next", layers=3, experts=6, inner=32),
    "qwen3next-fused": Sizes("qwen3next", layers=3, experts=6, inner=32, fused=True),
    "gpt-oss": Sizes("gpt-oss", experts=6, inner=32),
}


class Values:
    """Random numbers of a spread that keeps activations finite in any depth."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def matrix(self, *shape: int) -> np.ndarray:
        return (self._rng.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)

    def norm(self, n: int) -> np.ndarray:
        return (1 + 0.1 * self._rng.standard_normal(n)).astype(np.float32)

    def vector(self, *shape: int) -> np.ndarray:
        return (0.5 * self._rng.standard_normal(shape)).astype(np.float32)


def tensors(size: Sizes, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 tensors by GGUF name, outermost axis first."""
    v = Values(seed)
    # Without random signs a tied model mostly repeats its last token.
    signs = np.sign(v.vector(size.hidden))
    found = {
        "token_embd.weight": v.matrix(size.vocabulary, size.hidden) * 8,
        "output_norm.weight": v.norm(size.hidden) * signs,
    }
    second = "ffn" if size.architecture in PLAIN else "post_attention"
    for i in range(size.layers):
        mixer = _delta_net if size.recurrent(i) else _attention
        parts = {
            "attn_norm.weight": v.norm(size.hidden), f"{second}_norm.weight": v.norm(size.hidden),
            **mixer(size, v), **(_experts if size.experts else _ffn)(size, v),
        }  # fmt: skip
        found |= {f"blk.{i}.{name}": values for name, values in parts.items()}
    return found | (_further(size, v) if size.further else {})


def _further(size: Sizes, v: Values) -> dict[str, np.ndarray]:
    """The block that predicts one token more: attention, a network, and what joins its inputs."""
    parts = {
        "attn_norm.weight": v.norm(size.hidden), "post_attention_norm.weight": v.norm(size.hidden),
        **_attention(size, v), **(_experts if size.experts else _ffn)(size, v),
        "nextn.eh_proj.weight": v.matrix(size.hidden, 2 * size.hidden),
        **{f"nextn.{x}norm.weight": v.norm(size.hidden) for x in ("e", "h", "shared_head_")},
    }  # fmt: skip
    return {f"blk.{size.layers}.{name}": values for name, values in parts.items()}


PLAIN = ("llama", "qwen2", "qwen3", "qwen3moe")


def _attention(size: Sizes, v: Values) -> dict[str, np.ndarray]:
    q, kv = size.heads * size.dim, size.kv_heads * size.dim
    found = {
        "attn_q.weight": v.matrix(2 * q if size.hybrid else q, size.hidden),
        "attn_k.weight": v.matrix(kv, size.hidden), "attn_v.weight": v.matrix(kv, size.hidden),
        "attn_output.weight": v.matrix(size.hidden, q),
    }  # fmt: skip
    if size.architecture.startswith("qwen3"):
        found |= {f"attn_{x}_norm.weight": v.norm(size.dim) for x in "qk"}
    if size.architecture == "gpt-oss":
        rows = {"q": q, "k": kv, "v": kv, "output": size.hidden}
        found |= {f"attn_{name}.bias": v.vector(n) for name, n in rows.items()}
        found["attn_sinks.weight"] = v.vector(size.heads)
    return found


def _delta_net(size: Sizes, v: Values) -> dict[str, np.ndarray]:
    values, hidden = size.value_heads * size.v_dim, size.hidden
    channels = 2 * size.key_heads * size.k_dim + values
    found = {
        "attn_qkv.weight": v.matrix(channels, hidden), "attn_gate.weight": v.matrix(values, hidden),
        "ssm_conv1d.weight": v.matrix(channels, size.taps),
        "ssm_dt.bias": v.vector(size.value_heads),
        "ssm_a": -np.exp(v.vector(size.value_heads)), "ssm_norm.weight": v.norm(size.v_dim),
        "ssm_out.weight": v.matrix(hidden, values),
    }  # fmt: skip
    if size.architecture != "qwen3next":
        return found | {
            f"ssm_{name}.weight": v.matrix(size.value_heads, hidden) for name in ("alpha", "beta")
        }
    found["ssm_ba.weight"] = v.matrix(2 * size.value_heads, hidden)
    if size.fused:
        qkv, z = found.pop("attn_qkv.weight"), found.pop("attn_gate.weight")
        found["ssm_in.weight"] = fused_rows(size, qkv, z)
    return found


def fused_rows(size: Sizes, qkv: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Rows of both as older files have them: of each key head its query, key, values and gates."""
    groups, keys = size.key_heads, size.key_heads * size.k_dim
    parts = (qkv[:keys], qkv[keys : 2 * keys], qkv[2 * keys :], z)
    return np.concatenate([p.reshape(groups, -1, p.shape[1]) for p in parts], 1).reshape(
        -1, z.shape[1]
    )


def _ffn(size: Sizes, v: Values, tail: str = "") -> dict[str, np.ndarray]:
    return {
        f"ffn_gate{tail}.weight": v.matrix(size.inner, size.hidden),
        f"ffn_up{tail}.weight": v.matrix(size.inner, size.hidden),
        f"ffn_down{tail}.weight": v.matrix(size.hidden, size.inner),
    }


def _experts(size: Sizes, v: Values) -> dict[str, np.ndarray]:
    shapes = {
        "gate": (size.inner, size.hidden), "up": (size.inner, size.hidden),
        "down": (size.hidden, size.inner),
    }  # fmt: skip
    found = {"ffn_gate_inp.weight": v.matrix(size.experts, size.hidden)}
    for name, shape in shapes.items():
        found[f"ffn_{name}_exps.weight"] = v.matrix(size.experts, *shape)
    if size.hybrid:
        found |= _ffn(size, v, "_shexp") | {"ffn_gate_inp_shexp.weight": v.vector(size.hidden)}
    if size.architecture == "gpt-oss":
        found["ffn_gate_inp.bias"] = v.vector(size.experts)
        for name, (rows, _) in shapes.items():
            found[f"ffn_{name}_exps.bias"] = v.vector(size.experts, rows)
    return found


def metadata(size: Sizes) -> dict[str, Any]:
    """Hyperparameters under the architecture's prefix."""
    found = {
        "block_count": size.layers + size.further, "context_length": size.context,
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
    if size.hybrid:
        found |= {
            "ssm.conv_kernel": size.taps, "ssm.state_size": size.k_dim,
            "ssm.group_count": size.key_heads, "ssm.time_step_rank": size.value_heads,
            "ssm.inner_size": size.value_heads * size.v_dim,
            "full_attention_interval": size.interval, "rope.dimension_count": size.dim // 2,
        }  # fmt: skip
        if size.experts:
            found["expert_shared_feed_forward_length"] = size.inner
    if size.further:
        found["nextn_predict_layers"] = 1
    if size.architecture.startswith("qwen35"):
        found["rope.dimension_sections"] = [3, 3, 2, 0]
    if size.architecture == "gpt-oss":
        found |= {
            "attention.sliding_window": 20, "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64,
        }  # fmt: skip
    return found


def model_files(folder: Path, sizes: Mapping[str, Sizes]) -> Callable[..., Path]:
    """A function of the name of some sizes and a type: the file of that model, written once."""

    def made(name: str, kind: str = "F32") -> Path:
        path = folder / f"{name}-{kind}.gguf"
        return path if path.exists() else write_model(path, sizes[name], kind)

    return made


def write_model(
    path: Path, size: Sizes | None = None, kind: str = "F32", extra: dict[str, Any] | None = None,
    without: tuple[str, ...] = (), replace: dict[str, np.ndarray] | None = None,
    without_key: str = "",
) -> Path:  # fmt: skip
    """Write a model with matrices of type `kind`; `extra` overrides metadata keys."""
    size = size or Sizes()
    writer = gguf.GGUFWriter(path, size.architecture)
    keys = {**metadata(size), "tokenizer.ggml.model": "none", **(extra or {})}
    keys.pop(without_key, None)
    for key, value in keys.items():
        name = key if "." in key and key.split(".")[0] in ("general", "tokenizer") else ""
        _add(writer, name or f"{size.architecture}.{key}", value)
    for name, values in {**tensors(size), **(replace or {})}.items():
        if name in without:
            continue
        kept = ("gate_inp", "conv1d", ".bias")
        quantise = kind != "F32" and values.ndim > 1 and not any(part in name for part in kept)
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
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        kinds[type(value)](key, value)
