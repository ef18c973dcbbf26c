"""Blocks of every format taken apart in numpy: unsigned codes, scales and minima.

b is uint8 [N, blocks, bytes]; codes are [N, blocks, elements], scales [N, blocks, scale groups].
"""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.backends.cpu.tile.formats import IQ4_VALUES

Array = np.ndarray[Any, Any]
Parts = tuple[Array, Array, Array | None]


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


DECODE = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "IQ4_NL": _iq4_nl,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
