"""How a file says that its rotary embeddings are stretched to longer contexts."""

from __future__ import annotations

import math
from typing import NamedTuple

from runtime.errors import ModelError
from runtime.models.keys import Keys

KINDS = ("none", "linear", "yarn", "longrope")


class Scaling(NamedTuple):
    """`rope.scaling.*` of a file; `factor` is how many times longer the context becomes.

    attention: multiplies cos and sin. yarn_magnitude: does so in place of YaRN's own 1 + 0.1 ln
    factor. truncate: YaRN's ramp begins and ends at whole dimensions; not so in gpt-oss.
    """

    kind: str = "none"
    factor: float = 1.0
    original: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    extrapolation: float = 1.0
    attention: float = 1.0
    yarn_magnitude: float | None = None
    truncate: bool = True

    @staticmethod
    def read(keys: Keys, context: int, truncate: bool = True, kind: str = "linear") -> Scaling:
        """From metadata; ModelError for a kind that is not implemented."""
        legacy = keys.number("rope.scale_linear", 1.0)
        kind = keys.text("rope.scaling.type", kind)
        if kind not in KINDS:
            raise ModelError(
                f"{keys.source}: {keys.architecture}.rope.scaling.type = {kind!r:.60} is not "
                f"implemented; supported are {', '.join(KINDS)} and rope_freqs factors (llama3)"
            )
        factor = _positive(keys, "rope.scaling.factor", legacy)
        extrapolation = keys.number("rope.scaling.yarn_ext_factor", 1.0)
        return Scaling(
            kind,
            factor,
            keys.count("rope.scaling.original_context_length", context, least=0) or context,
            _positive(keys, "rope.scaling.yarn_beta_fast", 32.0),
            _positive(keys, "rope.scaling.yarn_beta_slow", 1.0),
            extrapolation if extrapolation >= 0 else 1.0,  # llama.cpp's sign of an unset value
            keys.number("rope.scaling.attn_factor", 1.0),
            _magnitude(keys, factor),
            truncate,
        )


def _positive(keys: Keys, key: str, default: float) -> float:
    """A number above zero; 0 stands for the default."""
    value = keys.number(key, default) or default
    if not 1e-6 <= value <= 1e6:
        raise ModelError(
            f"{keys.source}: {keys.architecture}.{key} = {value} must be positive (1e-6 to 1e6)"
        )
    return value


def _magnitude(keys: Keys, factor: float) -> float | None:
    """What a file wants in place of 1 + 0.1 ln factor; None where it does not say."""
    share = keys.number("rope.scaling.yarn_log_multiplier", 0.0)
    if keys.has("rope.scaling.yarn_attn_factor"):
        return keys.number("rope.scaling.yarn_attn_factor")
    return yarn_magnitude(factor) / yarn_magnitude(factor, share) if share else None


def yarn_magnitude(factor: float, share: float = 1.0) -> float:
    """What YaRN multiplies cos and sin by (Peng et al. 2023)."""
    return 1.0 + 0.1 * share * math.log(factor) if factor > 1 else 1.0
