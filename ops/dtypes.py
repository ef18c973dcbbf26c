"""Element types: plain numbers and the GGUF block formats, with their sizes and file ids.

A block format stores `block` consecutive elements of a row in `nbytes` bytes, so a row's length
must be a multiple of `block`. Ids are `ggml_type`; `blocks` has the block formats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .blocks import BLOCK_FORMATS
from .errors import FileError, OpError


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    `numpy` is the storage type of a plain type (bf16 is kept as its bits in uint16) and None for
    block formats; `gguf_id` is None for types that no file can hold.
    """

    name: str
    block: int
    nbytes: int
    gguf_id: int | None
    numpy: np.dtype | None = None

    @property
    def is_blocked(self) -> bool:
        """True when elements cannot be addressed one by one."""
        return self.numpy is None

    @property
    def is_float(self) -> bool:
        """True for f64, f32, f16 and bf16."""
        return self.name in ("f64", "f32", "f16", "bf16")

    def __repr__(self) -> str:
        return self.name


DTYPES: dict[str, DType] = {}


def _plain(name: str, gguf_id: int | None, numpy: str) -> DType:
    storage = np.dtype(numpy).newbyteorder("<")
    return _register(DType(name, 1, storage.itemsize, gguf_id, storage))


def _register(dtype: DType) -> DType:
    DTYPES[dtype.name] = dtype
    return dtype


F32 = _plain("f32", 0, "f4")
F16 = _plain("f16", 1, "f2")
I8 = _plain("i8", 24, "i1")
I16 = _plain("i16", 25, "i2")
I32 = _plain("i32", 26, "i4")
I64 = _plain("i64", 27, "i8")
F64 = _plain("f64", 28, "f8")
BF16 = _plain("bf16", 30, "u2")
U8 = _plain("u8", None, "u1")
for _row in BLOCK_FORMATS.values():
    _register(DType(_row.name, _row.block, _row.nbytes, _row.gguf_id))
Q8_0, Q4_K, Q5_K, Q6_K, MXFP4 = (DTYPES[n] for n in ("q8_0", "q4_k", "q5_k", "q6_k", "mxfp4"))

_BY_ID = {dtype.gguf_id: dtype for dtype in DTYPES.values() if dtype.gguf_id is not None}


def from_gguf(gguf_id: int) -> DType:
    """The type with this `ggml_type` number; FileError naming the number when there is none."""
    dtype = _BY_ID.get(gguf_id)
    if dtype is None:
        raise FileError(
            f"unknown tensor type {gguf_id}; supported types: "
            + ", ".join(f"{d.name} ({i})" for i, d in sorted(_BY_ID.items()))
        )
    return dtype


def nbytes_for(dtype: DType, shape: Sequence[int]) -> int:
    """Bytes of a contiguous tensor of `shape` (outermost axis first, the last axis in blocks).

    OpError when the last axis is not a whole number of blocks or an axis is negative.
    """
    row = shape[-1] if len(shape) else 1
    if row % dtype.block:
        raise OpError(
            f"{dtype.name} stores blocks of {dtype.block} elements, so the last axis of shape "
            f"{tuple(shape)} must be a multiple of {dtype.block}"
        )
    if any(n < 0 for n in shape):
        raise OpError(f"shape {tuple(shape)} has a negative axis")
    return math.prod(int(n) for n in shape) // dtype.block * dtype.nbytes
