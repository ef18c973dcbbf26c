"""Decoders of the K formats: 256 elements with scales of groups, themselves quantised."""

from __future__ import annotations

import numpy as np

from . import dtypes as dt
from .quant_blocks import F16_FIELD, U8_FIELD, decodes, f32, nibbles, planes, spread


def _scales_and_minima(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 6-bit scales and minima of 8 groups from 12 bytes: two uint8 [n, 8].

    Bytes 0-3 and 4-7 hold the first four of each in their low 6 bits; bytes 8-11 the low halves
    of the last four, whose top bits are the top bits of bytes 0-3 and 4-7.
    """
    first, second, low = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scale = np.concatenate([first & 63, low & 15 | first >> 6 << 4], axis=-1)
    minimum = np.concatenate([second & 63, low >> 4 | second >> 6 << 4], axis=-1)
    return scale, minimum


def _affine(block: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """d * scale * code - dmin * minimum, by groups of 32."""
    scale, minimum = _scales_and_minima(block["scales"])
    values = spread(f32(block["d"]) * f32(scale), codes.astype(np.float32))
    offset = f32(block["dmin"]) * f32(minimum)
    return (values.reshape(len(block), 8, 32) - offset[..., None]).reshape(len(block), -1)


@decodes(dt.Q2_K, scales=(U8_FIELD, 16), qs=(U8_FIELD, 64), d=(F16_FIELD, 1), dmin=(F16_FIELD, 1))
def _q2_k(block: np.ndarray) -> np.ndarray:
    codes = planes(block["qs"].reshape(-1, 2, 32), 2)
    values = spread(f32(block["d"]) * f32(block["scales"] & 15), f32(codes))
    offset = f32(block["dmin"]) * f32(block["scales"] >> 4)
    return (values.reshape(len(block), 16, 16) - offset[..., None]).reshape(len(block), -1)


@decodes(dt.Q3_K, hmask=(U8_FIELD, 32), qs=(U8_FIELD, 64), scales=(U8_FIELD, 12), d=(F16_FIELD, 1))
def _q3_k(block: np.ndarray) -> np.ndarray:
    packed = block["scales"]
    low, high = nibbles(packed[:, :8]), planes(packed[:, 8:], 2).reshape(-1, 16)
    scale = f32(low | high << 4) - 32
    codes = planes(block["qs"].reshape(-1, 2, 32), 2).reshape(-1, 256)
    top = planes(block["hmask"], 1).reshape(-1, 256)
    return spread(f32(block["d"]) * scale, f32(codes | top << 2) - 4)


@decodes(dt.Q4_K, d=(F16_FIELD, 1), dmin=(F16_FIELD, 1), scales=(U8_FIELD, 12), qs=(U8_FIELD, 128))
def _q4_k(block: np.ndarray) -> np.ndarray:
    return _affine(block, nibbles(block["qs"].reshape(-1, 4, 32)))


@decodes(
    dt.Q5_K,
    d=(F16_FIELD, 1),
    dmin=(F16_FIELD, 1),
    scales=(U8_FIELD, 12),
    qh=(U8_FIELD, 32),
    qs=(U8_FIELD, 128),
)
def _q5_k(block: np.ndarray) -> np.ndarray:
    low = nibbles(block["qs"].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return _affine(block, low | planes(block["qh"], 1) << 4)


@decodes(dt.Q6_K, ql=(U8_FIELD, 128), qh=(U8_FIELD, 64), scales=("i1", 16), d=(F16_FIELD, 1))
def _q6_k(block: np.ndarray) -> np.ndarray:
    low = nibbles(block["ql"].reshape(-1, 2, 64)).reshape(-1, 256)
    high = planes(block["qh"].reshape(-1, 2, 32), 2).reshape(-1, 256)
    return spread(f32(block["d"]) * f32(block["scales"]), f32(low | high << 4) - 32)
