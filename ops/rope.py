"""Rotary position embedding (Su et al. 2021): angles once per step, rotation per layer."""

from __future__ import annotations

import numpy as np

from runtime.ops.dtypes import I32
from runtime.ops.registry import Arg, Case, need, op
from runtime.ops.tensor import Shape, Tensor

STYLES = ("neox", "normal")


def _angles_shape(positions: Tensor, inv_freq: Tensor, *, magnitude: float) -> Shape:
    need(positions.ndim == 1 and inv_freq.ndim == 1, "needs positions [T] and frequencies [half]")
    return (positions.shape[0], inv_freq.shape[0], 2)


def _positions(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    return rng.integers(0, 40_000, shape).astype(np.int32)


def _frequencies(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    return (10_000.0 ** (-np.arange(shape[0]) / shape[0])).astype(np.float32)


@op(
    "rope_angles",
    shape=_angles_shape,
    flops=lambda node: 20 * node.size,
    cases=[
        Case((Arg((5,), I32, _positions), Arg((16,), make=_frequencies)), {"magnitude": 1.0}),
        Case((Arg((1,), I32, _positions), Arg((5,), make=_frequencies)), {"magnitude": 1.25}),
    ],
)
def rope_angles(positions: np.ndarray, inv_freq: np.ndarray, *, magnitude: float) -> np.ndarray:
    """[T, half, 2]: cos and sin of position * inverse frequency, times `magnitude` (YaRN's)."""
    angles = positions[:, None].astype(np.float64) * inv_freq[None].astype(np.float64)
    return np.stack([np.cos(angles), np.sin(angles)], -1) * magnitude


def _rope_shape(x: Tensor, angles: Tensor, *, style: str) -> Shape:
    need(style in STYLES, f"style {style!r} is not one of {STYLES}")
    need(x.ndim == 3, f"x must be [tokens, heads, head_dim], got {list(x.shape)}")
    need(2 * angles.shape[1] <= x.shape[2], f"{2 * angles.shape[1]} rotated of {x.shape[2]} dims")
    return x.shape


@op(
    "rope",
    shape=_rope_shape,
    flops=lambda node: 3 * node.size,
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
