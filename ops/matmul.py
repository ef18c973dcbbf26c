"""Matrix products with weights: one matrix for all tokens, or one chosen per token (experts)."""

from __future__ import annotations

import numpy as np

from runtime.ops.dtypes import I32
from runtime.ops.registry import Arg, Case, Kind, need, op
from runtime.ops.tensor import Shape, Tensor


def _matmul_shape(x: Tensor, w: Tensor) -> Shape:
    need(w.ndim == 2, f"weight must be [rows, inner], got {list(w.shape)}")
    need(
        x.shape[-1] == w.shape[-1],
        f"inner sizes {x.shape[-1]} and {w.shape[-1]} differ",
    )
    return (*x.shape[:-1], w.shape[0])


def _w(*shape: int) -> Arg:
    return Arg(shape, leaf="weight", make=lambda r, s: r.standard_normal(s) / s[-1] ** 0.5)


@op(
    "matmul",
    kind=Kind.CONTRACTION,
    axes="* k, n k -> * n",
    shape=_matmul_shape,
    flops=lambda node, seen: 2 * seen.size(node) * int(node.inputs[1].shape[-1]),
    cases=[
        Case(((1, 64), _w(16, 64))),
        Case(((5, 96), _w(17, 96))),  # rows past a tile
        Case(((9, 128), _w(40, 128))),
        Case(((3, 40), _w(1, 40))),  # inner size that is no multiple of a block
        Case(((5, 256), _w(18, 256))),  # and of all of them
    ],
)
def matmul(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """y[..., n] = sum over k of x[..., k] * w[n, k]."""
    return x @ w.T


def _matmul_id_shape(x: Tensor, w: Tensor, ids: Tensor) -> Shape:
    need(w.ndim == 3, f"weight must be [experts, rows, inner], got {list(w.shape)}")
    need(ids.ndim == 2, f"ids must be [tokens, used], got {list(ids.shape)}")
    need(x.shape[-1] == w.shape[-1], f"inner sizes {x.shape[-1]} and {w.shape[-1]} differ")
    need(
        tuple(x.shape[:-1]) in ((ids.shape[0],), tuple(ids.shape)),
        f"x must be [tokens, inner] or [tokens, used, inner] for ids {list(ids.shape)}",
    )
    return (*ids.shape, w.shape[1])


def _ids(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    return np.stack([rng.permutation(4)[: shape[1]] for _ in range(shape[0])]).astype(np.int32)


@op(
    "matmul_id",
    kind=Kind.CONTRACTION,
    axes="T k, Experts n k, T U -> T U n | T U k, Experts n k, T U -> T U n",
    picks={1: 2},
    shape=_matmul_id_shape,
    flops=lambda node, seen: 2 * seen.size(node) * int(node.inputs[1].shape[-1]),
    cases=[
        Case(((1, 64), _w(4, 20, 64), Arg((1, 2), I32, _ids))),
        Case(((11, 64), _w(4, 16, 64), Arg((11, 3), I32, _ids))),
        Case(((6, 2, 96), _w(4, 33, 96), Arg((6, 2), I32, _ids))),  # a row of x per choice
        Case(((6, 256), _w(4, 18, 256), Arg((6, 2), I32, _ids))),
    ],
)
def matmul_id(x: np.ndarray, w: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """y[t, j, n] = sum over k of x[t, (j,) k] * w[ids[t, j], n, k]: expert j of token t.

    Where an id is below 0 the expert is not here: what its row holds means nothing (NaN).
    """
    rows = x if x.ndim == 3 else np.repeat(x[:, None], ids.shape[1], axis=1)
    out = np.full((*ids.shape, w.shape[1]), np.nan, np.result_type(x, w, np.float32))
    for expert in np.unique(ids[ids >= 0]):
        at = ids == expert
        out[at] = rows[at] @ w[expert].T
    return out
