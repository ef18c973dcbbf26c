"""Blocks of every format taken apart in numpy: unsigned codes, scales and minima.

b is uint8 [N, blocks, bytes]; codes are [N, blocks, elements], scales [N, blocks, scale groups].
"""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.backends.cpu.tile import reference_books
from runtime.backends.cpu.tile.formats import E2M1_VALUES, IQ4_VALUES

Array = np.ndarray[Any, Any]
# codes, scales, minimum of each 32 if any, and perhaps its factors for each 16
Parts = tuple[Any, ...]


def half(blocks: Array, at: int) -> Array:
    """The float16 at byte `at` of each block, as float32."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: Array) -> Array:
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth_bits(blocks: Array, at: int) -> Array:
    bits = np.unpackbits(blocks[..., at : at + 4], axis=-1, bitorder="little")
    return bits << 4


def _q8_0(b: Array) -> Parts:
    return b[..., 2:].view(np.int8).astype(np.int32) + 128, half(b, 0), None


def _q4_0(b: Array) -> Parts:
    return _nibbles(b[..., 2:]), half(b, 0), None


def _q4_1(b: Array) -> Parts:
    return _nibbles(b[..., 4:]), half(b, 0), half(b, 2)


def _q5_0(b: Array) -> Parts:
    return _nibbles(b[..., 6:]) | _fifth_bits(b, 2), half(b, 0), None


def _q5_1(b: Array) -> Parts:
    return _nibbles(b[..., 8:]) | _fifth_bits(b, 4), half(b, 0), half(b, 2)


def _iq4_nl(b: Array) -> Parts:
    return np.array(IQ4_VALUES)[_nibbles(b[..., 2:])] + 128, half(b, 0), None


def six_bits(packed: Array) -> tuple[Array, Array]:
    """The 8 scales and 8 minima of 6 bits in 12 bytes of a K block."""
    low, high, last = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([low & 63, (last & 15) | ((low >> 6) << 4)], axis=-1)
    minima = np.concatenate([high & 63, (last >> 4) | ((high >> 6) << 4)], axis=-1)
    return scales, minima


def _k_parts(b: Array, codes: Array) -> Parts:
    scales, minima = six_bits(b[..., 4:16])
    return codes, half(b, 0) * scales, -(half(b, 2) * minima)


def _k_nibbles(packed: Array) -> Array:
    """Four times 32 bytes: 32 low nibbles, then the 32 high ones."""
    return _nibbles(packed.reshape(*packed.shape[:-1], 4, 32)).reshape(*packed.shape[:-1], 256)


def _q4_k(b: Array) -> Parts:
    return _k_parts(b, _k_nibbles(b[..., 16:]))


def _q5_k(b: Array) -> Parts:
    high = (b[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    codes = _k_nibbles(b[..., 48:]) | (high << 4).reshape(*b.shape[:-1], 256)
    return _k_parts(b, codes)


def _q6_k(b: Array) -> Parts:
    shape = b.shape[:-1]
    low = b[..., :128].reshape(*shape, 2, 64)
    low = np.concatenate([low & 15, low >> 4], axis=-1)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = (b[..., 128:192].reshape(*shape, 2, 1, 32) >> shifts) & 3
    codes = low.reshape(*shape, 256) | (high << 4).reshape(*shape, 256)
    return codes, half(b, 208) * b[..., 192:208].view(np.int8), None


def _q1_0(b: Array) -> Parts:
    bits = np.unpackbits(b[..., 2:], axis=-1, bitorder="little")
    return 2 * bits, half(b, 0).repeat(4, axis=-1), None


def _q2_0(b: Array) -> Parts:
    codes = b[..., 2:, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3
    return codes.reshape(*b.shape[:-1], 64), half(b, 0).repeat(2, axis=-1), None


def _mxfp4(b: Array) -> Parts:
    scale = np.ldexp(np.float32(1), b[..., 0].astype(np.int32) - 128)
    return np.array(E2M1_VALUES)[_nibbles(b[..., 1:])] + 16, scale, None


def _nvfp4(b: Array) -> Parts:
    exponent, mantissa = (b[..., :4] >> 3 & 15).astype(np.int32), b[..., :4] & 7
    value = np.ldexp(mantissa + np.where(exponent > 0, 8, 0), np.maximum(exponent, 1) - 11)
    scale = np.where(b[..., :4] == 0x7F, 0, value)
    codes = _nibbles(b[..., 4:].reshape(*b.shape[:-1], 4, 8))
    return np.array(E2M1_VALUES)[codes] + 16, scale, None


def _iq4_xs(b: Array) -> Parts:
    low = np.stack([b[..., 4:8] & 15, b[..., 4:8] >> 4], axis=-1).reshape(*b.shape[:-1], 8)
    high = (b[..., 2:4, None] >> np.arange(0, 8, 2, dtype=np.uint8)) & 3
    scale = (low | high.reshape(low.shape) << 4).astype(np.float32) - 32
    codes = _nibbles(b[..., 8:].reshape(*b.shape[:-1], 8, 16))
    return np.array(IQ4_VALUES)[codes] + 128, half(b, 0) * scale, None


def _two_bits(packed: Array) -> Array:
    """Every 32 bytes are 128 elements: all bits 0 and 1 first, then all bits 2 and 3, ..."""
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    codes = (packed.reshape(*packed.shape[:-1], -1, 1, 32) >> shifts) & 3
    return codes.reshape(*packed.shape[:-1], -1)


def _q2_k(b: Array) -> Parts:
    """Codes are two bits times the scale of 16; four bits are the factors of the minima."""
    factors = np.repeat(b[..., :16] & 15, 16, axis=-1)
    scale, minimum = (half(b, at).repeat(8, axis=-1) for at in (80, 82))
    return _two_bits(b[..., 16:80]) * factors, scale, -minimum, b[..., :16] >> 4


def _q3_k(b: Array) -> Parts:
    """Codes are 128 - (three bits - 4) * (six bits of scale - 32), the float scale is -d."""
    low = np.concatenate([b[..., 96:104] & 15, b[..., 96:104] >> 4], axis=-1)
    high = (b[..., None, 104:108] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]) & 3
    scale = (low | high.reshape(low.shape) << 4).astype(np.int32) - 32
    third = (b[..., None, :32] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    bits = _two_bits(b[..., 32:96]) | third.reshape(*b.shape[:-1], 256) << 2
    codes = 128 - (bits.astype(np.int32) - 4) * scale.repeat(16, axis=-1)
    return codes, -half(b, 108).repeat(8, axis=-1), None


def _digits(packed: Array, count: int) -> Array:
    """Base-3 digits of bytes that are fractions of 256: first digits of all bytes first."""
    powers = (3 ** np.arange(count, dtype=np.int32))[:, None]
    digits = (packed[..., None, :] * powers & 255) * 3 >> 8
    return digits.reshape(*packed.shape[:-1], -1)


def _tq1_0(b: Array) -> Parts:
    parts = _digits(b[..., :32], 5), _digits(b[..., 32:48], 5), _digits(b[..., 48:52], 4)
    return np.concatenate(parts, axis=-1), half(b, 52).repeat(8, axis=-1), None


def _tq2_0(b: Array) -> Parts:
    return _two_bits(b[..., :64]), half(b, 64).repeat(8, axis=-1), None


DECODE = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "IQ4_NL": _iq4_nl,
    "Q1_0": _q1_0,
    "Q2_0": _q2_0,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
    "IQ4_XS": _iq4_xs,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    **reference_books.DECODE,
}
