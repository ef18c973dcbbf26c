"""The planes of a packed block of every format in numpy.

b is uint8 [group, block, row, bytes of one row's block]; each step gives planes in order, as arrays
[group, block, plane, row, bytes of a value].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from runtime.backends.cpu.tile import reference_books
from runtime.backends.cpu.tile.formats import ROWS
from runtime.backends.cpu.tile.reference_formats import Array, six_bits


def _flat(values: Array) -> Array:
    """[group, block, row, bytes of one value] as one plane."""
    return np.ascontiguousarray(values).reshape(*values.shape[:2], 1, ROWS, -1)


def _words(values: Array) -> Array:
    """[group, block, row, 4 * words] as word planes."""
    shape = values.shape
    return values.reshape(*shape[:3], shape[3] // 4, 4).transpose(0, 1, 3, 2, 4)


def _bytes(values: Array) -> Array:
    """[group, block, row, n] as n planes of one byte per row."""
    return values.transpose(0, 1, 3, 2)[..., None]


def _fifth_bits(values: Array) -> Array:
    """Four bytes of bits, element 4w + k, as the plane with bit w of byte k."""
    bits = np.unpackbits(values, axis=-1, bitorder="little")
    bits = bits.reshape(*values.shape[:3], 8, 4).swapaxes(3, 4)
    return _flat(np.packbits(bits, axis=-1, bitorder="little")[..., 0])


def _values(b: Array) -> list[Array]:
    return [_flat(b)]


def _pairs(b: Array) -> list[Array]:
    """BF16: neighbours share a lane; an odd last one has a zero beside it."""
    groups, blocks, rows, size = b.shape
    padded = np.zeros((groups, blocks + blocks % 2, rows, size), np.uint8)
    padded[:, :blocks] = b
    pairs = padded.reshape(groups, -1, 2, rows, size).transpose(0, 1, 3, 2, 4)
    return [_flat(pairs)]


def _q8_0(b: Array) -> list[Array]:
    return [_flat(b[..., :2]), _words(b[..., 2:] ^ 0x80)]


def _q4_0(b: Array) -> list[Array]:
    return [_flat(b[..., :2]), _words(b[..., 2:])]


def _q4_1(b: Array) -> list[Array]:
    return [_flat(b[..., :2]), _flat(b[..., 2:4]), _words(b[..., 4:])]


def _q5_0(b: Array) -> list[Array]:
    return [_flat(b[..., :2]), _fifth_bits(b[..., 2:6]), _words(b[..., 6:])]


def _q5_1(b: Array) -> list[Array]:
    ends = [_flat(b[..., :2]), _flat(b[..., 2:4])]
    return [*ends, _fifth_bits(b[..., 4:8]), _words(b[..., 8:])]


def _k_chunks(b: Array, nibbles: int) -> list[Array]:
    scales, minima = six_bits(b[..., 4:16])
    planes = []
    for j in range(4):
        two = slice(2 * j, 2 * j + 2)
        planes += [_bytes(scales[..., two]), _bytes(minima[..., two])]
        planes.append(_words(b[..., nibbles + 32 * j : nibbles + 32 * (j + 1)]))
    return planes


def _q4_k(b: Array) -> list[Array]:
    return [_flat(b[..., :2]), _flat(b[..., 2:4]), *_k_chunks(b, 16)]


def _q5_k(b: Array) -> list[Array]:
    ends = [_flat(b[..., :2]), _flat(b[..., 2:4])]
    return [*ends, _words(b[..., 16:48]), *_k_chunks(b, 48)]


def _q6_k(b: Array) -> list[Array]:
    planes = [_flat(b[..., 208:])]
    for h in range(2):
        planes.append(_bytes(b[..., 192 + 8 * h : 200 + 8 * h]))
        planes.append(_words(b[..., 64 * h : 64 * (h + 1)]))
        planes.append(_words(b[..., 128 + 32 * h : 160 + 32 * h]))
    return planes


def _q1_0(b: Array) -> list[Array]:
    return [_flat(b[..., :2]), *(_fifth_bits(b[..., at : at + 4]) for at in range(2, 18, 4))]


def _q2_0(b: Array) -> list[Array]:
    """Planes of 16 elements: bits 2w of byte k are element 4w + k."""
    codes = b[..., 2:, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3  # [.., byte, its codes]
    codes = codes.reshape(*b.shape[:-1], 4, 4, 4).swapaxes(-1, -2)  # [.., plane, k, w]
    planes = (codes << np.arange(0, 8, 2, dtype=np.uint8)).sum(-1, dtype=np.uint8)
    return [_flat(b[..., :2]), _words(planes.reshape(*b.shape[:-1], 16))]


def _mxfp4(b: Array) -> list[Array]:
    return [_flat(b[..., :1]), _words(b[..., 1:])]


def _nvfp4(b: Array) -> list[Array]:
    return [_bytes(np.where(b[..., :4] == 0x7F, 0, b[..., :4] & 0x7F)), _words(b[..., 4:])]


def _iq4_xs(b: Array) -> list[Array]:
    planes = [_flat(b[..., :2])]
    low = np.stack([b[..., 4:8] & 15, b[..., 4:8] >> 4], axis=-1).reshape(*b.shape[:-1], 8)
    high = (b[..., 2:4, None] >> np.arange(0, 8, 2, dtype=np.uint8)) & 3
    scales = (low | high.reshape(low.shape) << 4) - np.uint8(32)
    for j in range(4):
        planes.append(_bytes(scales[..., 2 * j : 2 * j + 2]))
        planes.append(_words(b[..., 8 + 32 * j : 40 + 32 * j]))
    return planes


def _q2_k(b: Array) -> list[Array]:
    ends = [_flat(b[..., 80:82]), _flat(b[..., 82:])]
    return [*ends, _words(b[..., 16:80]), _bytes(b[..., :16])]


def _q3_k(b: Array) -> list[Array]:
    low = np.concatenate([b[..., 96:104] & 15, b[..., 96:104] >> 4], axis=-1)
    high = (b[..., None, 104:108] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]) & 3
    scale = 32 - (low | high.reshape(low.shape) << 4).astype(np.int32)
    scale = (np.abs(scale) | np.where(scale < 0, 128, 0)).astype(np.uint8)
    planes = [_flat(b[..., 108:]), _words(b[..., 32:96])]
    for h in range(2):
        bits = b[..., :32] >> 4 * h & 15
        planes.append(_words(bits[..., :16] | bits[..., 16:] << 4))
    return [*planes, _bytes(scale)]


def _tq1_0(b: Array) -> list[Array]:
    return [_flat(b[..., 52:]), _words(b[..., :52])]


def _tq2_0(b: Array) -> list[Array]:
    return [_flat(b[..., 64:]), _words(b[..., :64])]


def _book(name: str) -> Callable[[Array], list[Array]]:
    kinds = {"words": _words, "bytes": _bytes, "pairs": _flat}
    return lambda b: [kinds[kind](plane) for kind, plane in reference_books.bytes_of(name, b)]


PLANES = {
    "F32": _values,
    "F16": _values,
    "BF16": _pairs,
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "IQ4_NL": _q4_0,
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
    **{name: _book(name) for name in reference_books.DECODE},
}
