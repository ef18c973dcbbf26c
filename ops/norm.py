"""Normalisation over the last axis."""

from __future__ import annotations

import numpy as np

from runtime.ops.registry import Case, Kind, need, op
from runtime.ops.tensor import Shape, Tensor


def _shape(x: Tensor, w: Tensor, *, eps: float) -> Shape:
    need(w.shape == x.shape[-1:], f"weight {list(w.shape)} must match the last axis of x")
    return x.shape


@op(
    "rms_norm",
    kind=Kind.ROWWISE,
    shape=_shape,
    flops=4,
    cases=[
        Case(((1, 32), (32,)), {"eps": 1e-6}),
        Case(((3, 5, 37), (37,)), {"eps": 1e-5}),  # odd row length
        Case(((9, 256), (256,)), {"eps": 1e-6}),
    ],
)
def rms_norm(x: np.ndarray, w: np.ndarray, *, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * w over the last axis (Zhang and Sennrich 2019)."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w
