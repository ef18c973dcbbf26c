"""Inverse frequencies of rotary embeddings and how files stretch them to longer contexts."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from runtime.errors import ModelError
from runtime.models.keys import Keys
from runtime.models.scaling import Scaling, yarn_magnitude
from runtime.models.weights import Weights
from runtime.ops import rope_components


class Rotary(NamedTuple):
    """Frequencies [dims / 2] float32, and the magnitude that cos and sin are scaled by.

    components: int32 [dims / 2], which of a token's positions a frequency takes (M-RoPE).
    """

    inv_freq: np.ndarray
    magnitude: float = 1.0
    components: np.ndarray | None = None


class RotarySizes(NamedTuple):
    """Rotated dimensions of a head, base of the frequencies, `rope.dimension_sections`.

    interleaved: the sections' frequencies take turns (Qwen3-VL and later).
    """

    dims: int
    base: float
    scaling: Scaling
    sections: tuple[int, ...] = ()
    interleaved: bool = True

    @staticmethod
    def read(
        keys: Keys, dim: int, context: int, truncate: bool = True, kind: str = "linear"
    ) -> RotarySizes:
        """From metadata, for heads of `dim`; ModelError where it contradicts itself.

        kind: how a file means `rope.scaling.factor` that does not say.
        """
        dims = keys.count("rope.dimension_count", dim)
        base = keys.number("rope.freq_base", 10000.0)
        # Ollama writes the sections under names of its own as well.
        names = ("rope.dimension_sections", "rope.mrope_section", "mrope_sections")
        sections = next(filter(None, [keys.counts(name) for name in names]), ())
        problems = {
            f"rope.dimension_count {dims} of a head of {dim}": dims > dim or dims % 2,
            f"rope.freq_base {base} must be above 1": base <= 1,
            f"rope.dimension_sections {list(sections)} of {dims // 2} frequencies": sections
            and (len(sections) > 4 or sum(sections) != dims // 2),
        }
        for message, wrong in problems.items():
            if wrong:
                raise ModelError(f"{keys.source}: {message}: the metadata contradicts itself")
        turns = keys.flag("rope.mrope_interleaved", True)  # Ollama's key
        return RotarySizes(dims, base, Scaling.read(keys, context, truncate, kind), sections, turns)

    @property
    def positions_per_token(self) -> int:
        """Four with M-RoPE: time, height, width and one more; else one."""
        return 4 if any(self.sections[1:]) else 1

    def rotary(self, w: Weights, context: int) -> Rotary:
        """Frequencies, stretched as the file says for sequences of up to `context` tokens."""
        plain = rotary(self.dims, self.base, self.scaling, self._factors(w, context))
        if self.positions_per_token == 1:
            return plain
        components = rope_components(self.sections, self.dims // 2, self.interleaved)
        return plain._replace(components=components)

    def _factors(self, w: Weights, context: int) -> np.ndarray | None:
        """What divides each frequency [dims / 2] (llama3); longrope has a list for each length."""
        if self.scaling.kind != "longrope":
            return w.values("rope_freqs.weight", self.dims // 2)
        names = [f"rope_factors_{which}.weight" for which in ("short", "long")]
        both = [w.values(name, self.dims // 2) for name in names]
        found = both[context > self.scaling.original]
        if found is None:
            raise ModelError(
                f"{w.source}: rope.scaling.type = 'longrope' needs the tensor "
                f"{names[context > self.scaling.original]!r}; convert the model again"
            )
        return found


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
        own = yarn_magnitude(scaling.factor) if scaling.extrapolation else 1.0
        magnitude *= own if scaling.yarn_magnitude is None else scaling.yarn_magnitude
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
