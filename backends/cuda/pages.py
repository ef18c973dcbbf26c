"""Pages of the cache in a GPU's memory, to and from the form that all devices share.

K [page, head, token, dim], V [page, head, dim, token]; see kernels/attention.py.
"""

from __future__ import annotations

import numpy as np

from runtime.ops.errors import BackendError
from runtime.ops.kv_formats import PAGE
from runtime.ops.tensor import Tensor


def to_plain(pages: np.ndarray, leaf: Tensor) -> np.ndarray:
    """uint8 [rows, bytes of a page] -> float32 [rows, PAGE, heads, dim]."""
    _, tokens, heads, dim = map(int, leaf.shape)
    if leaf.dtype.name != "f16":
        raise BackendError(f"{leaf!r}: not yet")
    if leaf.attrs["storage"] == "v":
        return (
            pages.view(np.float16)
            .reshape(-1, heads, dim, tokens)
            .transpose(0, 3, 1, 2)
            .astype("f4")
        )
    return pages.view(np.float16).reshape(-1, heads, tokens, dim).swapaxes(1, 2).astype(np.float32)


def from_plain(values: np.ndarray, leaf: Tensor) -> np.ndarray:
    """The inverse of `to_plain`."""
    _, _, heads, dim = map(int, leaf.shape)
    values = np.asarray(values, np.float32).reshape(-1, PAGE, heads, dim).astype(np.float16)
    axes = (0, 2, 3, 1) if leaf.attrs["storage"] == "v" else (0, 2, 1, 3)
    return np.ascontiguousarray(values.transpose(axes)).reshape(len(values), -1).view(np.uint8)
