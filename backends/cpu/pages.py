"""Cache pages of this backend to and from plain arrays [pages, PAGE, heads, dim].

A page holds the planes of its KVFormat for each KV head, one behind the other: of K transposed as
[numbers][PAGE], of V as [PAGE][numbers]. Heads are padded (`padded_head`) with zeros. The
conversion is exact both ways.
"""

from __future__ import annotations

import numpy as np

from runtime.ops.kv_formats import HEAD_UNIT, PAGE, fill, kv_format, padded_head
from runtime.ops.tensor import Tensor


def to_plain(memory: np.ndarray, leaf: Tensor, which: str) -> np.ndarray:
    """float32 [pages, PAGE, heads, dim] of uint8 `memory` [pages, bytes]; which: "k" or "v"."""
    heads, dim = int(leaf.shape[2]), int(leaf.shape[3])
    blocks = np.ascontiguousarray(memory).reshape(len(memory), heads, -1)
    format, planes, at = kv_format(leaf.dtype.name), [], 0
    for plane in format.planes:
        width = plane.width(padded_head(dim))
        end = at + PAGE * width * plane.dtype.nbytes
        numbers = np.ascontiguousarray(blocks[..., at:end]).view(plane.numpy)
        shape = (width, PAGE) if which == "k" else (PAGE, width)
        planes.append(_turned(numbers.reshape(*blocks.shape[:2], *shape), which))
        at = end
    return np.ascontiguousarray(format.decode(*planes)[..., :dim].transpose(0, 2, 1, 3))


def from_plain(plain: np.ndarray, leaf: Tensor, which: str) -> np.ndarray:
    """uint8 [pages, bytes] of float32 [pages, PAGE, heads, dim]; the inverse of `to_plain`."""
    rows = np.ascontiguousarray(plain.transpose(0, 2, 1, 3), np.float32)
    planes = kv_format(leaf.dtype.name).encode(fill(rows, HEAD_UNIT))
    parts = [np.ascontiguousarray(_turned(plane, which)).view(np.uint8) for plane in planes]
    return np.concatenate([p.reshape(*rows.shape[:2], -1) for p in parts], -1).reshape(
        len(plain), -1
    )


def _turned(numbers: np.ndarray, which: str) -> np.ndarray:
    """The last two axes swapped for K."""
    return numbers.swapaxes(-1, -2) if which == "k" else numbers
