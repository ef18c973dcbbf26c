"""Cache pages of this backend to and from plain arrays [pages, PAGE, heads, dim].

A page holds the planes of its KVFormat for each KV head, one behind the other: of K transposed as
[numbers][PAGE], where of codes four stay side by side, of V as [PAGE][numbers]; codes of V as
[PAGE / 4][numbers][4], and what groups of them share as in K. Heads are padded (`padded_head`)
with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.ops.kv_formats import HEAD_UNIT, PAGE, Plane, fill, kv_format, padded_head
from runtime.ops.tensor import Tensor


def to_plain(memory: np.ndarray, leaf: Tensor) -> np.ndarray:
    """float32 [pages, PAGE, heads, dim], exactly, of uint8 `memory` [pages, bytes]."""
    rows = kv_format(leaf.dtype.name).decode(*to_planes(memory, leaf))
    return np.ascontiguousarray(rows[..., : int(leaf.shape[3])])


def from_plain(plain: np.ndarray, leaf: Tensor) -> np.ndarray:
    """uint8 [pages, bytes] of float32 [pages, PAGE, heads, dim], rounded."""
    rows = fill(np.ascontiguousarray(plain, np.float32), HEAD_UNIT)
    return from_planes(kv_format(leaf.dtype.name).encode(rows), leaf)


def to_rows(memory: np.ndarray, leaf: Tensor) -> np.ndarray:
    """uint8 [pages, PAGE, heads, bytes of a token] of `memory` [pages, bytes], bit for bit."""
    return kv_format(leaf.dtype.name).to_rows(to_planes(memory, leaf))


def from_rows(rows: np.ndarray, leaf: Tensor) -> np.ndarray:
    """The inverse of `to_rows`."""
    return from_planes(kv_format(leaf.dtype.name).from_rows(rows, int(leaf.shape[3])), leaf)


def to_planes(memory: np.ndarray, leaf: Tensor) -> list[np.ndarray]:
    """The planes [pages, PAGE, heads, width] of `memory` [pages, bytes], bit for bit."""
    heads, dims = int(leaf.shape[2]), padded_head(int(leaf.shape[3]))
    blocks = np.ascontiguousarray(memory).reshape(len(memory), heads, -1)
    found, at = [], 0
    for plane in kv_format(leaf.dtype.name).planes:
        start, width = at, plane.width(dims)
        at += PAGE * width * plane.dtype.nbytes
        numbers = np.ascontiguousarray(blocks[..., start:at]).view(plane.numpy)
        shape, order = _order(plane, leaf, width)
        numbers = numbers.reshape(len(memory), heads, *(shape[i] for i in order))
        numbers = numbers.transpose(0, 1, *(2 + order.index(i) for i in range(4)))
        found.append(numbers.reshape(len(memory), heads, PAGE, width).swapaxes(1, 2))
    return found


def from_planes(planes: Sequence[np.ndarray], leaf: Tensor) -> np.ndarray:
    """The inverse of `to_planes`."""
    pages, _, heads, _ = planes[0].shape
    parts = []
    for numbers, plane in zip(planes, kv_format(leaf.dtype.name).planes, strict=True):
        shape, order = _order(plane, leaf, numbers.shape[3])
        turned = numbers.swapaxes(1, 2).reshape(pages, heads, *shape)
        turned = turned.transpose(0, 1, *(2 + i for i in order))
        parts.append(np.ascontiguousarray(turned).view(np.uint8).reshape(pages, heads, -1))
    return np.concatenate(parts, -1).reshape(pages, -1)


def _order(plane: Plane, leaf: Tensor, width: int) -> tuple[Sequence[int], Sequence[int]]:
    """A head's [PAGE, width] cut into four axes, and the order in which they lie in memory."""
    n = plane.together
    if leaf.attrs["storage"] == "k":
        return (PAGE, 1, width // n, n), (2, 0, 1, 3)
    if n > 1:
        return (PAGE // n, n, width, 1), (0, 2, 1, 3)
    inside = kv_format(leaf.dtype.name).coding is not None
    return (PAGE, 1, width, 1), (2, 0, 1, 3) if inside else (0, 1, 2, 3)
