"""Decoders of the formats with one scale level: Q*_0, Q*_1, Q8_K, ternary and 4-bit floats."""

from __future__ import annotations

import numpy as np

from . import dtypes as dt
from .quant_blocks import (
    F16_FIELD,
    U8_FIELD,
    bits,
    decodes,
    f32,
    fields,
    nibbles,
    planes,
    spread,
)

# E2M1 floats, doubled to be whole (OCP Microscaling Formats v1.0, table 5)
_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
# E8M0 powers of two, halved to undo the doubling
_E8M0 = np.ldexp(np.float32(1), np.arange(256) - 128)


def _ue4m3_table() -> np.ndarray:
    """Unsigned E4M3 (bias 7; the sign bit is ignored, 0x7f is no number), halved likewise."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    value = np.where(
        exponent == 0, mantissa / 512, (1 + mantissa / 8) * np.exp2(exponent.astype(float) - 7)
    )
    return f32(np.where(np.isin(code, (0, 0x7F)), 0, value / 2))


_UE4M3 = _ue4m3_table()


@decodes(dt.Q4_0, d=(F16_FIELD, 1), qs=(U8_FIELD, 16))
def _q4_0(block: np.ndarray) -> np.ndarray:
    return f32(block["d"]) * (f32(nibbles(block["qs"])) - 8)


@decodes(dt.Q4_1, d=(F16_FIELD, 1), m=(F16_FIELD, 1), qs=(U8_FIELD, 16))
def _q4_1(block: np.ndarray) -> np.ndarray:
    return f32(block["d"]) * f32(nibbles(block["qs"])) + f32(block["m"])


def _five_bits(block: np.ndarray) -> np.ndarray:
    return f32(nibbles(block["qs"]) | bits(block["qh"]) << 4)


@decodes(dt.Q5_0, d=(F16_FIELD, 1), qh=(U8_FIELD, 4), qs=(U8_FIELD, 16))
def _q5_0(block: np.ndarray) -> np.ndarray:
    return f32(block["d"]) * (_five_bits(block) - 16)


@decodes(dt.Q5_1, d=(F16_FIELD, 1), m=(F16_FIELD, 1), qh=(U8_FIELD, 4), qs=(U8_FIELD, 16))
def _q5_1(block: np.ndarray) -> np.ndarray:
    return f32(block["d"]) * _five_bits(block) + f32(block["m"])


@decodes(dt.Q8_0, d=(F16_FIELD, 1), qs=("i1", 32))
def _q8_0(block: np.ndarray) -> np.ndarray:
    return f32(block["d"]) * f32(block["qs"])


@decodes(dt.Q8_1, d=(F16_FIELD, 1), s=(F16_FIELD, 1), qs=("i1", 32))
def _q8_1(block: np.ndarray) -> np.ndarray:
    return f32(block["d"]) * f32(block["qs"])


@decodes(dt.Q8_K, d=("<f4", 1), qs=("i1", 256), sums=("<i2", 16))
def _q8_k(block: np.ndarray) -> np.ndarray:
    return block["d"] * f32(block["qs"])


@decodes(dt.Q1_0, d=(F16_FIELD, 1), qs=(U8_FIELD, 16))
def _q1_0(block: np.ndarray) -> np.ndarray:
    return f32(block["d"]) * (f32(bits(block["qs"])) * 2 - 1)


@decodes(dt.Q2_0, d=(F16_FIELD, 1), qs=(U8_FIELD, 16))
def _q2_0(block: np.ndarray) -> np.ndarray:
    """Four codes -1, 0, 1, 2 to a byte, lowest bits first."""
    codes = fields(block["qs"], 2, 4).reshape(len(block), -1)
    return f32(block["d"]) * (f32(codes) - 1)


def _trits(packed: np.ndarray, count: int) -> np.ndarray:
    """uint8 [n, m] -> int [n, count*m]: base-3 digits, the most significant of each byte first.

    A byte holds digits as the fraction byte/256, so digit j is the whole part of
    3 * frac(3**j * fraction).
    """
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:count, None]
    digits = (packed[:, None, :] * powers).astype(np.uint16) * 3 >> 8
    return digits.reshape(len(packed), -1)


@decodes(dt.TQ1_0, qs=(U8_FIELD, 48), qh=(U8_FIELD, 4), d=(F16_FIELD, 1))
def _tq1_0(block: np.ndarray) -> np.ndarray:
    qs = block["qs"]
    digits = [_trits(qs[:, :32], 5), _trits(qs[:, 32:], 5), _trits(block["qh"], 4)]
    return f32(block["d"]) * (f32(np.concatenate(digits, axis=-1)) - 1)


@decodes(dt.TQ2_0, qs=(U8_FIELD, 64), d=(F16_FIELD, 1))
def _tq2_0(block: np.ndarray) -> np.ndarray:
    digits = planes(block["qs"].reshape(-1, 2, 32), 2).reshape(len(block), -1)
    return f32(block["d"]) * (f32(digits) - 1)


@decodes(dt.MXFP4, e=(U8_FIELD, 1), qs=(U8_FIELD, 16))
def _mxfp4(block: np.ndarray) -> np.ndarray:
    return _E8M0[block["e"]] * _E2M1[nibbles(block["qs"])]


@decodes(dt.NVFP4, d=(U8_FIELD, 4), qs=(U8_FIELD, 32))
def _nvfp4(block: np.ndarray) -> np.ndarray:
    codes = nibbles(block["qs"].reshape(-1, 4, 8))
    return spread(_UE4M3[block["d"]], _E2M1[codes])
