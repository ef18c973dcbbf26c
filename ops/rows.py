"""Rows picked by number: embeddings of tokens, and the rows of a step that are wanted."""

from __future__ import annotations

import numpy as np

from runtime.ops.dtypes import F32, I32, DType
from runtime.ops.registry import Arg, Case, Kind, need, op
from runtime.ops.tensor import Shape, Tensor


def _shape(matrix: Tensor, ids: Tensor) -> tuple[Shape, DType]:
    need(matrix.ndim == 2 and ids.ndim == 1, "needs a matrix [rows, n] and ids [count]")
    return (ids.shape[0], matrix.shape[1]), F32


def _select_shape(x: Tensor, ids: Tensor) -> Shape:
    need(x.ndim >= 2 and ids.ndim == 1, "needs rows [T, ...] and ids [count]")
    return (ids.shape[0], *x.shape[1:])


def _ids(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    return rng.integers(0, 7, shape).astype(np.int32)


@op(
    "get_rows",
    kind=Kind.GATHER,
    axes="Rows n, i -> i n",
    picks={0: 1},
    shape=_shape,
    flops=0,
    cases=[Case((Arg((7, n), leaf="weight"), Arg((5,), I32, _ids))) for n in (64, 256)],
)
def get_rows(matrix: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Rows of a weight, dequantised: the embedding of each token id."""
    return matrix[ids]


@op(
    "select_rows",
    kind=Kind.GATHER,
    axes="T *, i -> i *",
    linear=((0,),),
    picks={0: 1},
    shape=_select_shape,
    flops=0,
    cases=[Case(((7, 33), Arg((4,), I32, _ids))), Case(((7, 3, 16), Arg((4,), I32, _ids)))],
)
def select_rows(x: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Rows of an activation: the tokens whose logits are wanted."""
    return x[ids]
