"""Mixture of experts around `matmul_id`: scores, choice, weights, and the weighted sum."""

from __future__ import annotations

import numpy as np

from runtime.ops.dtypes import I32, DType
from runtime.ops.registry import Arg, Case, Kind, need, op, same_shape
from runtime.ops.tensor import Shape, Tensor


@op(
    "softmax",
    kind=Kind.ROWWISE,
    shape=same_shape,
    flops=6,
    cases=[Case(((3, 8),)), Case(((5, 37),))],
)
def softmax(x: np.ndarray) -> np.ndarray:
    """exp(x - max) / sum over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _ties(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    return rng.integers(0, 9, shape)


def _top_k_shape(x: Tensor, *, k: int) -> tuple[Shape, DType]:
    need(0 < k <= x.shape[-1], f"top {k} of {x.shape[-1]}")
    return (*x.shape[:-1], k), I32


@op(
    "top_k",
    kind=Kind.ROWWISE,
    shape=_top_k_shape,
    cases=[Case(((3, 8),), {"k": 2}), Case((Arg((6, 60), make=_ties),), {"k": 8})],
)
def top_k(x: np.ndarray, *, k: int) -> np.ndarray:
    """Indices of the k largest of the last axis, largest first, ties to the lowest index."""
    return np.argsort(-x, axis=-1, kind="stable")[..., :k].astype(np.int32)


def _choice(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    return rng.integers(0, 8, shape).astype(np.int32)


@op(
    "take",
    kind=Kind.ROWWISE,
    shape=lambda x, ids: ids.shape,
    cases=[Case(((3, 8), Arg((3, 2), I32, _choice)))],
)
def take(x: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """x[t, ids[t, j]]: the scores of the chosen experts."""
    return np.take_along_axis(x, ids, -1)


def _numbers(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    return rng.integers(-1, 4, shape).astype(np.int32)


def _renumber_shape(ids: Tensor, numbers: Tensor) -> Shape:
    need(ids.ndim == 2 and numbers.ndim == 1, "needs ids [T, used] and numbers [experts]")
    return ids.shape


@op(
    "renumber",
    kind=Kind.ROWWISE,
    axes="t u, Experts -> t u",
    shape=_renumber_shape,
    flops=0,
    cases=[Case((Arg((5, 3), I32, _choice), Arg((8,), I32, _numbers)))],
)
def renumber(ids: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """numbers[ids[t, j]]: where a device keeps an expert among its own, -1 where it does not."""
    return numbers[ids]


def _positive(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    return rng.random(shape) + 0.1


@op("normalize", kind=Kind.ROWWISE, shape=same_shape, cases=[Case((Arg((3, 4), make=_positive),))])
def normalize(x: np.ndarray) -> np.ndarray:
    """x / sum(x) over the last axis: the weights of the chosen experts made to sum to 1."""
    return x / x.sum(-1, keepdims=True)


def _bias_shape(y: Tensor, bias: Tensor, ids: Tensor) -> Shape:
    need(y.ndim == 3 and bias.ndim == 2, "needs y [T, used, n] and bias [experts, n]")
    need(tuple(y.shape[:2]) == tuple(ids.shape), f"ids must be [T, used], got {ids!r}")
    need(bias.shape[1] == y.shape[2], f"biases of {bias.shape[1]} rows for {y.shape[2]}")
    return y.shape


@op(
    "expert_bias",
    kind=Kind.ELEMENTWISE,
    axes="t u n, Experts n, t u -> t u n",
    linear=((0, 1),),
    picks={1: 2},
    shape=_bias_shape,
    cases=[Case(((5, 3, 40), Arg((8, 40), leaf="weight"), Arg((5, 3), I32, _choice)))],
)
def expert_bias(y: np.ndarray, bias: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """y[t, j] + bias[ids[t, j]]: each expert's own bias. Rows of ids below 0 mean nothing."""
    return y + bias[ids]


def _sum_shape(y: Tensor, weights: Tensor, ids: Tensor | None = None) -> Shape:
    need(tuple(y.shape[:2]) == tuple(weights.shape), "needs y [T, used, n] and weights [T, used]")
    need(ids is None or ids.shape == weights.shape, "ids must be [T, used]")
    return (y.shape[0], y.shape[2])


@op(
    "expert_sum",
    kind=Kind.REDUCTION,
    axes="t u n, t u, t u -> t n",
    linear=((0,), (1,)),
    shape=_sum_shape,
    flops=lambda node, seen: 2 * seen.size(node.inputs[0]),
    cases=[
        Case(((5, 3, 40), (5, 3))),
        Case(((5, 3, 40), (5, 3), Arg((5, 3), I32, _numbers))),
    ],
)
def expert_sum(y: np.ndarray, weights: np.ndarray, ids: np.ndarray | None = None) -> np.ndarray:
    """sum over j of weights[t, j] * y[t, j], in the order of j; without those of ids below 0."""
    terms = y * weights[..., None]
    return (terms if ids is None else np.where(ids[..., None] < 0, 0, terms)).sum(1)
