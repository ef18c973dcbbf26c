"""Elementwise ops."""

from __future__ import annotations

import numpy as np

from runtime.ops.registry import Case, Kind, need, op, same_shape
from runtime.ops.tensor import Shape, Tensor


def _with_bias(x: Tensor, y: Tensor) -> Shape:
    """Equal shapes, or a vector along the last axis of x."""
    if y.ndim == 1 and x.ndim > 1:
        need(y.shape[0] == x.shape[-1], f"vector of {y.shape[0]} on a last axis of {x.shape[-1]}")
        return x.shape
    return same_shape(x, y)


@op(
    "add",
    kind=Kind.ELEMENTWISE,
    linear=((0, 1),),
    shape=_with_bias,
    cases=[Case(((3, 40), (3, 40))), Case(((3, 37), (37,)))],
)
def add(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x + y; y is of x's shape or a vector along the last axis (a bias)."""
    return x + y


@op(
    "mul",
    kind=Kind.ELEMENTWISE,
    linear=((0,), (1,)),
    shape=_with_bias,
    cases=[Case(((3, 40), (3, 40))), Case(((2, 33), (33,)))],
)
def mul(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x * y; y is of x's shape or a vector along the last axis."""
    return x * y


@op(
    "scale",
    kind=Kind.ELEMENTWISE,
    linear=((0,),),
    shape=lambda x, *, factor: x.shape,
    cases=[Case(((2, 35),), {"factor": 0.125})],
)
def scale(x: np.ndarray, *, factor: float) -> np.ndarray:
    """x times a number known when the graph is built."""
    return x * factor


def _with_column(x: Tensor, s: Tensor) -> Shape:
    need(s.ndim == x.ndim and s.shape[-1] == 1, f"needs one factor per row of {list(x.shape)}")
    need(tuple(s.shape[:-1]) == tuple(x.shape[:-1]), f"rows of {list(x.shape)} and {s!r} differ")
    return x.shape


@op(
    "row_scale",
    kind=Kind.ELEMENTWISE,
    linear=((0,), (1,)),
    shape=_with_column,
    cases=[Case(((3, 40), (3, 1)))],
)
def row_scale(x: np.ndarray, s: np.ndarray) -> np.ndarray:
    """x [..., n] times one number per row, s [..., 1]."""
    return x * s


@op("silu", kind=Kind.ELEMENTWISE, shape=same_shape, flops=5, cases=[Case(((3, 50),))])
def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x) (Elfwing et al. 2017)."""
    return x / (1 + np.exp(-x))


@op("sigmoid", kind=Kind.ELEMENTWISE, shape=same_shape, flops=4, cases=[Case(((3, 50),))])
def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def _swiglu_shape(gate: Tensor, up: Tensor, *, alpha: float, limit: float) -> Shape:
    need(limit > 0, f"limit={limit} must be positive")
    return same_shape(gate, up)


@op(
    "swiglu_oai",
    kind=Kind.ELEMENTWISE,
    shape=_swiglu_shape,
    flops=10,
    cases=[Case(((3, 50), (3, 50)), {"alpha": 1.702, "limit": 0.7})],
)
def swiglu_oai(gate: np.ndarray, up: np.ndarray, *, alpha: float, limit: float) -> np.ndarray:
    """(up + 1) * gate * sigmoid(alpha * gate), as gpt-oss (OpenAI 2025) has it.

    Before that gate is cut to at most `limit`, up to -limit..limit.
    """
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return (up + 1) * gate / (1 + np.exp(-alpha * gate))
