"""Metadata of a converted model: what every architecture has, in the order of llama.cpp's files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtime.conversion.config import Config
from runtime.conversion.pieces import Planned
from runtime.ops.errors import ModelError, shown

# settings of generation_config.json -> general.sampling.*, and the type they have there
_SAMPLING: dict[str, tuple[str, Any]] = {
    "sequence": ("sequence", str), "top_k": ("top_k", np.int32), "top_p": ("top_p", np.float32),
    "min_p": ("min_p", np.float32), "xtc_probability": ("xtc_probability", np.float32),
    "xtc_threshold": ("xtc_threshold", np.float32), "temperature": ("temp", np.float32),
    "penalty_last_n": ("penalty_last_n", np.int32),
    "repetition_penalty": ("penalty_repeat", np.float32),
    "penalty_repeat": ("penalty_repeat", np.float32), "mirostat": ("mirostat", np.int32),
    "mirostat_tau": ("mirostat_tau", np.float32), "mirostat_eta": ("mirostat_eta", np.float32),
}  # fmt: skip
# setting -> key, in order; those without a value are left out
_SIZES = {
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
}  # fmt: skip
_EXPERTS = {"num_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (0, "K"))


def general(
    architecture: str, folder: str, sampling: Mapping[str, Any], tensors: Sequence[Planned]
) -> dict[str, Any]:
    """`general.*` keys; sampling: what generation_config.json holds."""
    found: dict[str, Any] = {"general.architecture": architecture, "general.type": "model"}
    for name, (key, kind) in _SAMPLING.items():
        try:
            if sampling.get(name) is not None:
                found[f"general.sampling.{key}"] = kind(sampling[name])
        except (TypeError, ValueError, OverflowError):
            raise ModelError(
                f"generation_config.json: {name} = {shown(sampling[name])} cannot be used"
            ) from None
    found["general.name"] = _title(folder)
    found["general.size_label"] = size_label(tensors)
    return found


def sizes(config: Config, blocks: int, windows: bool) -> dict[str, Any]:
    """Keys of the architecture that every model has, without its prefix.

    windows: layers that see a part of the context alone are implemented.
    """
    found: dict[str, Any] = {"block_count": blocks, "context_length": config.context(windows)}
    found |= {key: config.optional(name) for name, key in _SIZES.items()}
    found |= _rope(config)
    found["attention.layer_norm_rms_epsilon"] = config.number("rms_norm_eps", 1e-6)
    found |= {key: config.optional(name) for name, key in _EXPERTS.items()}
    found["attention.key_length"] = found["attention.value_length"] = config.optional("head_dim")
    return {key: value for key, value in found.items() if value is not None}


def _rope(config: Config) -> dict[str, Any]:
    rope, found = config.rope, {}
    if (kind := rope["rope_type"]) in ("linear", "yarn"):
        found = {"rope.scaling.type": kind, "rope.scaling.factor": _needed(config, "factor")}
    if kind == "yarn":
        original = _needed(config, "original_max_position_embeddings")
        found["rope.scaling.original_context_length"] = int(original)
        attention = rope.get("attention_factor", rope.get("attn_factor"))
        found |= {
            f"rope.scaling.yarn_{key}": None if value is None else float(value)
            for key, value in (
                ("ext_factor", rope.get("extrapolation_factor")), ("attn_factor", attention),
                ("beta_fast", rope.get("beta_fast")), ("beta_slow", rope.get("beta_slow")),
            )
        }  # fmt: skip
    if sections := rope.get("mrope_section"):
        found["rope.dimension_sections"] = [*sections, 0, 0, 0, 0][:4]
    return found | {"rope.freq_base": float(rope["rope_theta"])}


def _needed(config: Config, key: str) -> float:
    if key not in config.rope:
        raise ModelError(f"{config.path}: rope setting {key} is missing")
    return float(config.rope[key])


def rope_frequencies(config: Config) -> np.ndarray:
    """What divides each rotary frequency, float32 [head / 2] (Llama 3.1: long waves stretched)."""
    rope, dim = config.rope, config.head_dim()
    one = np.float32(1)
    power = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    # in 64 bits: numpy's power of 32 bits is off by some units in the last place
    steps = rope.get("rope_theta", 10000.0) ** power.astype(np.float64)
    # torch divides a number by an array so: by its reciprocal
    waves = one / (one / steps.astype(np.float32)) * np.float32(2 * math.pi)
    factor, low, high, length = (
        float(rope.get(key, default))
        for key, default in (
            ("factor", 8.0), ("low_freq_factor", 1.0), ("high_freq_factor", 4.0),
            ("original_max_position_embeddings", 8192),
        )
    )  # fmt: skip
    smooth = (one / waves * np.float32(length) - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    found = np.where(waves < length / high, 1, np.where(waves > length / low, factor, between))
    return found.astype(np.float32)


def size_label(tensors: Sequence[Planned]) -> str:
    """How many numbers a model has, "1.5B"; with experts those of a pass by one, "8x7B"."""
    count, each = 0, 0
    for tensor in tensors:
        of_experts = tensor.name.endswith("_exps.weight")
        count = tensor.shape[0] if of_experts else count
        each += math.prod(tensor.shape) // (tensor.shape[0] if of_experts else 1)
    unit, letter = next((u, letter) for u, letter in _UNITS if each > u)
    number = each / (unit or 1e3)
    digits = max(0, 2 - len(str(round(number)).lstrip("0")))
    return f"{count}x" * bool(count) + f"{number:.{digits}f}{letter}"


def _title(folder: str) -> str:
    """The name of a folder as words: "my-model-v2" is "My Model v2"."""
    words = folder.replace("-", " ").split() if " " not in folder else [folder]
    plain = re.compile(r"v\d+(\.\d+)*|\d.*")
    return " ".join(w.title() if w.islower() and not plain.fullmatch(w) else w for w in words)
