"""Rotation of heads by Walsh-Hadamard transforms, so that no dim of a group stands out."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np

from runtime.ops.registry import Case, Kind, need, op
from runtime.ops.tensor import Shape, Tensor


def blocks(dim: int, block: int) -> Iterator[slice]:
    """What of a row of `dim` is transformed together: `block` dims at a time, then fewer."""
    start = 0
    while start < dim:
        while block > dim - start:
            block //= 2
        yield slice(start, start + block)
        start += block


@cache
def walsh(n: int) -> np.ndarray:
    """The orthonormal, symmetric Walsh-Hadamard matrix, float64 [n, n]; n a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / n**0.5


def _shape(x: Tensor, *, block: int) -> Shape:
    need(block > 0 and block & (block - 1) == 0, f"block={block} is no power of two")
    return x.shape


@op(
    "hadamard",
    kind=Kind.ROWWISE,
    shape=_shape,
    flops=lambda node, seen: seen.size(node) * node.attrs["block"].bit_length(),
    cases=[
        Case(((3, 2, 64),), {"block": 64}),
        Case(((4, 3, 128),), {"block": 32}),
        Case(((3, 2, 100),), {"block": 64}),  # 64, 32 and 4
        Case(((2, 3, 15),), {"block": 16}),
    ],
)
def hadamard(x: np.ndarray, *, block: int) -> np.ndarray:
    """Orthonormal Walsh-Hadamard transforms of `block` dims of the last axis, a power of two.

    Dims that are left behind whole blocks take the largest powers of two that fit, one after the
    other. It is its own inverse.
    """
    out = np.array(x)
    for part in blocks(x.shape[-1], block):
        out[..., part] = out[..., part] @ walsh(part.stop - part.start)
    return out
