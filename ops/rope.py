"""Rotary position embedding (Su et al. 2021): angles once per step, rotation per layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.ops.dtypes import F32, I32, DType
from runtime.ops.registry import Arg, Case, Kind, need, op
from runtime.ops.tensor import Shape, Tensor

STYLES = ("neox", "normal")


def rope_components(sections: Sequence[int], half: int, interleaved: bool) -> np.ndarray:
    """M-RoPE's component of a position (0 time, 1 height, 2 width, 3 other) per frequency.

    int32 [half]. `sections` are the frequencies of each component: in turn and over again where
    they are fewer than `half` (Qwen2-VL), or `interleaved` (Qwen3-VL), where frequency i takes
    component i % 3 while that one's section lasts, and the time after that. OpError for sections
    that are negative or all empty.
    """
    need(0 < len(sections) <= 4, f"sections {list(sections)} must be one to four counts")
    need(min(sections) >= 0 and sum(sections) > 0, f"sections {list(sections)} count nothing")
    i, counts = np.arange(half), np.zeros(4, np.int64)
    counts[: len(sections)] = sections
    if interleaved:
        return np.where(i < 3 * counts[i % 3], i % 3, 0).astype(np.int32)
    ends = np.cumsum(counts)
    return np.searchsorted(ends, i % ends[-1], side="right").astype(np.int32)


def _angles_shape(
    positions: Tensor, inv_freq: Tensor, *components: Tensor, magnitude: float
) -> tuple[Shape, DType]:
    need(inv_freq.ndim == 1, "needs frequencies [half]")
    if components:
        need(positions.shape[1:] == (4,), "needs positions [T, 4] to choose from")
        need(len(components) == 1, "takes at most one list of components")
        need(components[0].shape == inv_freq.shape, "needs one component per frequency")
    else:
        need(positions.ndim == 1, "needs positions [T], or components that choose among them")
    return (positions.shape[0], inv_freq.shape[0], 2), F32


def _positions(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    return rng.integers(0, 40_000, shape).astype(np.int32)


def _frequencies(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    return (10_000.0 ** (-np.arange(shape[0]) / shape[0])).astype(np.float32)


def _mrope_case(half: int, sections: tuple[int, ...], interleaved: bool) -> Case:
    chosen = rope_components(sections, half, interleaved)
    components = Arg((half,), I32, lambda rng, shape: chosen)
    frequencies = Arg((half,), make=_frequencies)
    return Case((Arg((5, 4), I32, _positions), frequencies, components), {"magnitude": 1.0})


@op(
    "rope_angles",
    kind=Kind.ROWWISE,
    shape=_angles_shape,
    flops=20,
    cases=[
        Case((Arg((5,), I32, _positions), Arg((16,), make=_frequencies)), {"magnitude": 1.0}),
        Case((Arg((1,), I32, _positions), Arg((5,), make=_frequencies)), {"magnitude": 1.25}),
        _mrope_case(32, (11, 11, 10, 0), True),
        _mrope_case(20, (4, 8, 8, 0), False),
    ],
)
def rope_angles(
    positions: np.ndarray, inv_freq: np.ndarray, *components: np.ndarray, magnitude: float
) -> np.ndarray:
    """[T, half, 2]: cos and sin of position * inverse frequency, times `magnitude` (YaRN's).

    positions: int32 [T], or [T, 4] with `components` int32 [half], the one that each frequency
    turns with; see `rope_components`.
    """
    chosen = positions[:, components[0]] if components else positions[:, None]
    angles = chosen.astype(np.float64) * inv_freq[None].astype(np.float64)
    return np.stack([np.cos(angles), np.sin(angles)], -1) * magnitude


def _rope_shape(x: Tensor, angles: Tensor, *, style: str) -> Shape:
    need(style in STYLES, f"style {style!r} is not one of {STYLES}")
    need(x.ndim == 3, f"x must be [tokens, heads, head_dim], got {list(x.shape)}")
    need(2 * angles.shape[1] <= x.shape[2], f"{2 * angles.shape[1]} rotated of {x.shape[2]} dims")
    return x.shape


@op(
    "rope",
    kind=Kind.ROWWISE,
    axes="t h D, t Half Pair -> t h D",
    shape=_rope_shape,
    flops=3,
    cases=[
        Case(((3, 2, 32), (3, 16, 2)), {"style": "neox"}),
        Case(((3, 2, 32), (3, 16, 2)), {"style": "normal"}),
        Case(((4, 3, 40), (4, 8, 2)), {"style": "neox"}),  # partial: 16 of 40 dims
    ],
)
def rope(x: np.ndarray, angles: np.ndarray, *, style: str) -> np.ndarray:
    """Rotate pairs of dims: (i, i + half) for "neox", (2i, 2i + 1) for "normal"; the rest stays."""
    half = angles.shape[1]
    cos, sin = angles[:, None, :, 0], angles[:, None, :, 1]
    step = slice(0, half), slice(half, 2 * half)
    first, second = step if style == "neox" else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    out = np.array(x, np.result_type(x, angles))
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out
