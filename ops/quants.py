"""Stored bytes to float32, for every element type a model file can hold.

Values are those of ggml's reference dequantisation (dequantize_row_* of ggml-quants.c), bit for
bit: the same products in the same order, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .blocks import BLOCK_FORMATS
from .dtypes import BF16, DType, nbytes_for
from .errors import OpError
from .quant_blocks import decode, struct_of

_ELEMENTS_AT_ONCE = 1 << 17  # keeps a step's temporaries in the cache


def dequantize(
    raw: np.ndarray, dtype: DType, shape: Sequence[int], out: np.ndarray | None = None
) -> np.ndarray:
    """Values of the bytes `raw` (uint8, contiguous) as float32 of `shape` (outermost first).

    `out`, a contiguous float32 array of `shape`, is filled and returned when given. OpError when
    the sizes disagree or the type has no decoder.
    """
    shape = tuple(shape)
    raw = np.ascontiguousarray(raw).reshape(-1).view(np.uint8)
    if raw.size != nbytes_for(dtype, shape):
        raise OpError(
            f"{dtype} {list(shape)} takes {nbytes_for(dtype, shape)} bytes, {raw.size} given"
        )
    out = np.empty(shape, np.float32) if out is None else out
    if out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise OpError(
            f"out must be contiguous float32 {list(shape)}, not {out.dtype} {list(out.shape)}"
        )
    with np.errstate(all="ignore"):
        if dtype.numpy is None:
            _decode_blocks(raw, dtype, out.reshape(-1, dtype.block))
        elif dtype is BF16:
            out.reshape(-1).view(np.uint32)[:] = raw.view("<u2").astype(np.uint32) << 16
        else:
            out.reshape(-1)[:] = raw.view(dtype.numpy)
    return out


def _decode_blocks(raw: np.ndarray, dtype: DType, out: np.ndarray) -> None:
    row = BLOCK_FORMATS[dtype.name]
    blocks = raw.view(struct_of(row))
    step = _ELEMENTS_AT_ONCE // row.block
    for start in range(0, len(blocks), step):
        out[start : start + step] = decode(row, blocks[start : start + step])
