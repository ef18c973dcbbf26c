"""Inverse frequencies of rotary embeddings and how files stretch them to longer contexts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from runtime.errors import ModelError
from runtime.models.keys import Keys


@dataclass(frozen=True)
class Rotary:
    """Frequencies [dims / 2] float32, and the magnitude that cos and sin are scaled by."""

    inv_freq: np.ndarray
    magnitude: float = 1.0


@dataclass(frozen=True)
class Scaling:
    """`rope.scaling.*` of a file; `factor` is how many times longer the context becomes.

    truncate: YaRN's ramp begins and ends at whole dimensions; not so in gpt-oss.
    """

    kind: str = "none"
    factor: float = 1.0
    original: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    extrapolation: float = 1.0
    attention: float = 1.0
    truncate: bool = True

    @staticmethod
    def read(keys: Keys, context: int) -> Scaling:
        """From metadata; ModelError for a kind that is not implemented."""
        legacy = keys.number("rope.scale_linear", 1.0)
        kind = keys.text("rope.scaling.type", "linear" if legacy != 1.0 else "none")
        if kind not in ("none", "linear", "yarn"):
            raise ModelError(
                f"{keys.source}: {keys.architecture}.rope.scaling.type = {kind!r} is not "
                "implemented; supported are none, linear, yarn and rope_freqs factors (llama3)"
            )
        factor = keys.number("rope.scaling.factor", legacy) or 1.0
        if factor <= 0:
            raise ModelError(f"{keys.source}: rope.scaling.factor = {factor} must be positive")
        return Scaling(
            kind,
            factor,
            keys.count("rope.scaling.original_context_length", context, least=0) or context,
            keys.number("rope.scaling.yarn_beta_fast", 32.0),
            keys.number("rope.scaling.yarn_beta_slow", 1.0),
            keys.number("rope.scaling.yarn_ext_factor", 1.0),
            keys.number("rope.scaling.attn_factor", 1.0)
            * keys.number("rope.scaling.yarn_attn_factor", 1.0),
        )


def rotary(dims: int, base: float, scaling: Scaling, factors: np.ndarray | None = None) -> Rotary:
    """The frequencies of `dims` rotated dimensions; `factors` [dims / 2] divide them (llama3)."""
    inv_freq = base ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)
    if factors is not None:
        inv_freq = inv_freq / factors.astype(np.float64)
    magnitude = scaling.attention
    if scaling.kind == "linear":
        inv_freq = inv_freq / scaling.factor
    elif scaling.kind == "yarn":
        keep = _kept_share(dims, base, scaling) * scaling.extrapolation
        inv_freq = inv_freq / scaling.factor * (1 - keep) + inv_freq * keep
        magnitude *= 1.0 + 0.1 * math.log(scaling.factor) if scaling.extrapolation else 1.0
    return Rotary(inv_freq.astype(np.float32), magnitude)


def _kept_share(dims: int, base: float, scaling: Scaling) -> np.ndarray:
    """YaRN (Peng et al. 2023): 1 where a frequency is kept, 0 where it is interpolated."""

    def dim_of(rotations: float) -> float:
        ratio = scaling.original / (rotations * 2 * math.pi)
        return dims * math.log(ratio) / (2 * math.log(base))

    low, high = dim_of(scaling.beta_fast), dim_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(0, low), min(dims - 1, high)
    ramp = (np.arange(dims // 2) - low) / max(0.001, high - low)
    return 1 - np.clip(ramp, 0, 1)
