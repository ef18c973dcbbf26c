"""Element types: plain numbers and the GGUF block formats, with their sizes and file ids.

A block format stores `block` consecutive elements of a row in `nbytes` bytes, so a row's length
must be a multiple of `block`. Layouts are those of ggml's `ggml-common.h`; ids are `ggml_type`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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

    @property
    def bits_per_element(self) -> float:
        """Average storage of one element, scales included, in bits."""
        return 8 * self.nbytes / self.block

    def __repr__(self) -> str:
        return self.name


DTYPES: dict[str, DType] = {}


def _plain(name: str, gguf_id: int | None, numpy: str) -> DType:
    storage = np.dtype(numpy).newbyteorder("<")
    return _register(DType(name, 1, storage.itemsize, gguf_id, storage))


def _blocked(name: str, gguf_id: int, block: int, nbytes: int) -> DType:
    return _register(DType(name, block, nbytes, gguf_id))


def _register(dtype: DType) -> DType:
    DTYPES[dtype.name] = dtype
    return dtype


F32 = _plain("f32", 0, "f4")
F16 = _plain("f16", 1, "f2")
Q4_0 = _blocked("q4_0", 2, 32, 18)
Q4_1 = _blocked("q4_1", 3, 32, 20)
Q5_0 = _blocked("q5_0", 6, 32, 22)
Q5_1 = _blocked("q5_1", 7, 32, 24)
Q8_0 = _blocked("q8_0", 8, 32, 34)
Q8_1 = _blocked("q8_1", 9, 32, 36)  # two f16 scales; gguf-py counts two f32 (40), ggml does not
Q2_K = _blocked("q2_k", 10, 256, 84)
Q3_K = _blocked("q3_k", 11, 256, 110)
Q4_K = _blocked("q4_k", 12, 256, 144)
Q5_K = _blocked("q5_k", 13, 256, 176)
Q6_K = _blocked("q6_k", 14, 256, 210)
Q8_K = _blocked("q8_k", 15, 256, 292)
IQ2_XXS = _blocked("iq2_xxs", 16, 256, 66)
IQ2_XS = _blocked("iq2_xs", 17, 256, 74)
IQ3_XXS = _blocked("iq3_xxs", 18, 256, 98)
IQ1_S = _blocked("iq1_s", 19, 256, 50)
IQ4_NL = _blocked("iq4_nl", 20, 32, 18)
IQ3_S = _blocked("iq3_s", 21, 256, 110)
IQ2_S = _blocked("iq2_s", 22, 256, 82)
IQ4_XS = _blocked("iq4_xs", 23, 256, 136)
I8 = _plain("i8", 24, "i1")
I16 = _plain("i16", 25, "i2")
I32 = _plain("i32", 26, "i4")
I64 = _plain("i64", 27, "i8")
F64 = _plain("f64", 28, "f8")
IQ1_M = _blocked("iq1_m", 29, 256, 56)
BF16 = _plain("bf16", 30, "u2")
TQ1_0 = _blocked("tq1_0", 34, 256, 54)
TQ2_0 = _blocked("tq2_0", 35, 256, 66)
MXFP4 = _blocked("mxfp4", 39, 32, 17)
NVFP4 = _blocked("nvfp4", 40, 64, 36)
Q1_0 = _blocked("q1_0", 41, 128, 18)
Q2_0 = _blocked("q2_0", 42, 64, 18)
U8 = _plain("u8", None, "u1")

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
