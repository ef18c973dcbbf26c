"""What the block formats share: the registry of decoders and the ways bits are spread out.

A decoder takes n blocks as a structured array whose fields are the format's C struct and
returns float32 [n, elements]; the field order and bit order are those of ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .dtypes import DType

Decoder = Callable[[np.ndarray], np.ndarray]
# a format's decoder and the layout of its block, by dtype name
DECODERS: dict[str, tuple[np.dtype, Decoder]] = {}

F16_FIELD, U16_FIELD, U32_FIELD, U8_FIELD = "<f2", "<u2", "<u4", "u1"


def decodes(dtype: DType, **fields: Any) -> Callable[[Decoder], Decoder]:
    """Register a decoder for `dtype`, whose block has these fields (name=(type, count))."""
    layout = np.dtype([(name, kind, (count,)) for name, (kind, count) in fields.items()])
    if layout.itemsize != dtype.nbytes or dtype.name in DECODERS:
        raise ValueError(f"{dtype}: {layout.itemsize} bytes declared, or declared twice")

    def register(decoder: Decoder) -> Decoder:
        DECODERS[dtype.name] = layout, decoder
        return decoder

    return register


def f32(field: np.ndarray) -> np.ndarray:
    """The same values in float32."""
    return field.astype(np.float32)


def nibbles(packed: np.ndarray) -> np.ndarray:
    """uint8 [..., n] -> uint8 [..., 2n]: all low halves, then all high halves."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def planes(packed: np.ndarray, width: int) -> np.ndarray:
    """uint8 [..., n] -> uint8 [..., 8/width, n]: plane j holds bits width*j of every byte."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    return (packed[..., None, :] >> shifts) & np.uint8((1 << width) - 1)


def bits(packed: np.ndarray) -> np.ndarray:
    """uint8 [..., n] -> uint8 [..., 8n]: each byte's bits, lowest first."""
    return np.unpackbits(packed, axis=-1, bitorder="little")


def fields(packed: np.ndarray, width: int, count: int, step: int | None = None) -> np.ndarray:
    """[..., n] -> [..., n, count]: `count` fields of `width` bits from each word, lowest first.

    Fields start `step` bits apart (default: one after another).
    """
    shifts = (np.arange(count) * (step or width)).astype(packed.dtype)
    return (packed[..., None] >> shifts) & packed.dtype.type((1 << width) - 1)


def spread(scale: np.ndarray, values: np.ndarray) -> np.ndarray:
    """scale [n, groups] times values [n, elements] by group, as float32 [n, elements]."""
    n, groups = scale.shape
    return (scale[..., None] * values.reshape(n, groups, -1)).reshape(n, -1)
