"""Inverse frequencies of rotary embeddings and how files stretch them to longer contexts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from runtime.errors import ModelError
from runtime.models.keys import Keys
from runtime.ops import rope_components


@dataclass(frozen=True)
class Rotary:
    """Frequencies [dims / 2] float32, and the magnitude that cos and sin are scaled by.

    components: int32 [dims / 2], which of a token's positions a frequency takes (M-RoPE).
    """

    inv_freq: np.ndarray
    magnitude: float = 1.0
    components: np.ndarray | None = None


@dataclass(frozen=True)
class RotarySizes:
    """Rotated dimensions of a head, base of the frequencies, `rope.dimension_sections`."""

    dims: int
    base: float
    scaling: Scaling
    sections: tuple[int, ...] = ()

    @staticmethod
    def read(keys: Keys, dim: int, context: int, truncate: bool = True) -> RotarySizes:
        """From metadata, for heads of `dim`; ModelError where it contradicts itself."""
        dims = keys.count("rope.dimension_count", dim)
        base = keys.number("rope.freq_base", 10000.0)
        sections = keys.counts("rope.dimension_sections")
        problems = {
            f"rope.dimension_count {dims} of a head of {dim}": dims > dim or dims % 2,
            f"rope.freq_base {base} must be above 1": base <= 1,
            f"rope.dimension_sections {list(sections)} of {dims // 2} frequencies": sections
            and (len(sections) > 4 or sum(sections) != dims // 2),
        }
        for message, wrong in problems.items():
            if wrong:
                raise ModelError(f"{keys.source}: {message}: the metadata contradicts itself")
        return RotarySizes(dims, base, Scaling.read(keys, context, truncate), sections)

    @property
    def positions_per_token(self) -> int:
        """Four with M-RoPE: time, height, width and one more; else one."""
        return 4 if any(self.sections[1:]) else 1

    def rotary(self, factors: np.ndarray | None = None) -> Rotary:
        """Frequencies, stretched as the file says; `factors` [dims / 2] divide them (llama3)."""
        plain = rotary(self.dims, self.base, self.scaling, factors)
        if self.positions_per_token == 1:
            return plain
        return replace(plain, components=rope_components(self.sections, self.dims // 2, True))


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
    def read(keys: Keys, context: int, truncate: bool = True) -> Scaling:
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
            truncate,
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
