"""How weights and activations lie in GPU memory, and packing them with numpy.

**The canonical sum.** A row of `inner` values is `blocks` of 32 along k, the last filled up with
zeros. It is cut into stretches of `length` (even) consecutive blocks; `Cut` has the numbers, which
depend on `inner` alone. Within a stretch, block after block in order,

    acc = fma(y * n, xs, acc)     n: the block's integer sum of products, of codes as they are meant
                                  (less their offset, by the level table, times the integer scales
                                  of the block's halves), below 2^24; y: the row's float scale,
                                  xs: the column's; y * n is rounded once
    acc = fma(m, xs * s, acc)     formats with minima: m (float) is subtracted from each value, s is
                                  the negated integer sum of the activations that it concerns: of
                                  the block, or of the first and then of the second half (Q2_K)

Then the stretches' sums are added one after the other, then a bias, then a residual. All kernels
follow this, so a result's bits do not depend on which one computed it.

**Places.** Block `i` of stretch `s` lies at place ((i // 2) * stretches + s) * 2 + i % 2 of
`places` = stretches * length; places behind the last block hold zeros. So two neighbouring blocks
are 32 consecutive bytes of a plane of pieces (16 bytes), and one pair of every stretch, a lane
each, 32 * stretches.

**A packed matrix** is its rows one after another, each of `row_nbytes`; in a row lie the format's
parts (`parts` says where), each a multiple of 16 bytes:

    codes   16 bytes a block: low nibbles are the first half, high ones the second. IQ4_NL, IQ4_XS
            and MXFP4: word w is values 4 w .. 4 w + 3 of the first half, then of the second
            Q8_0: 32 bytes, int8: a plane of first halves [place], then one of second halves
            Q2_K, Q3_K: 8 bytes a block, pairs: word = half, bits 2 w + 8 j of value 4 w + j
    high    Q6_K: 8 bytes a block, bits 4 and 5 as pairs
            Q3_K, Q5_*: 4 bytes, bit 8 j + w + 4 h of value 16 h + 4 w + j
    scales  f16; Q4_1, Q5_1: f16 scale, f16 minimum; Q4_K, Q5_K: a byte of scale, one of minimum
            Q2_K: a byte a half, scale in the low nibble, minimum in the high one
            Q3_K, Q6_K: int8 a half; IQ4_XS: int8 a block; MXFP4: a byte, exponent
    supers  by eights of blocks in the order of the row: f16, or f16 scale and f16 minimum

Rows of F32, F16 and BF16 lie as in the file, filled up with zeros to a multiple of 8 values, and
have sums of their own. F32: of n units of 8 values stretch s of S takes units s, s + S, .. in
order, a fma a value, and S is the largest power of two <= 32 and <= max(1, n // 2); then the
stretches' sums are added as above. F16 and BF16: blocks of 64 values are summed by tensor cores,
in float32 from zero, of each half of a block the activations' pieces from the last to the first
(`kernels/halves.py`), of each piece two mma: value 8 t + 4 j + i of the half's 32 is in mma j, at
k = 2 t + i for i < 2, else at 2 t + 6 + i. Then, block after block in order,

    sum = fma(found, scale, sum)  the block's scale of the column, a power of two; 1 for BF16

How an mma adds its 16 products and the number it is given is the GPU's: it is taken for granted
that the same operands at the same k give the same bits, in any row, column and kernel. The
simulator adds them exactly and rounds once.

**Packed activations** are columns one after another, each `column_nbytes`: a plane of first halves
(16 int8) by place, one of second halves, and by place f32 scale and two int16, the negated sums of
the halves. Where weights are floats, a column is float32 filled up to a multiple of 8 values.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from runtime.ops.blocks import BLOCK_FORMATS, BlockFormat, Number
from runtime.ops.dtypes import DTYPES, DType
from runtime.ops.errors import BackendError
from runtime.ops.quant_blocks import numbers, struct_of

BLOCK = 32  # values
SUPER = 8  # blocks
PIECE = 16  # bytes
UNIT = 8  # values of a float row


class Cut(NamedTuple):
    """A row's `blocks`, the `lanes` they are meant for, `length` and number of `stretches`.

    `lanes` is the largest power of two <= 32 and <= max(1, blocks // 2), and >= `stretches`.
    """

    blocks: int
    lanes: int
    length: int
    stretches: int

    @property
    def places(self) -> int:
        """Blocks of all stretches."""
        return self.stretches * self.length

    def order(self) -> np.ndarray:
        """The block of each place; those from `blocks` on do not exist."""
        pair, odd = np.divmod(np.arange(self.places), 2)
        step, stretch = np.divmod(pair, self.stretches)
        return stretch * self.length + 2 * step + odd


def cut(inner: int) -> Cut:
    """How the sum over rows of `inner` values is cut."""
    blocks = -(-inner // BLOCK)
    lanes = 1 << max(1, min(32, blocks // 2)).bit_length() - 1
    length = 2 * -(-blocks // (2 * lanes))
    return Cut(blocks, lanes, length, -(-blocks // length))


class Part(NamedTuple):
    """One kind of numbers of a packed row: `nbytes` for each block, or each super-block."""

    name: str
    nbytes: int
    blocks: int = 1


_NIBBLES, _PAIRS, _FIFTH = Part("codes", 16), Part("codes", 8), Part("high", 4)
_F16, _TWO_F16 = Part("supers", 2, SUPER), Part("supers", 4, SUPER)
FORMATS: dict[str, tuple[Part, ...]] = {
    "Q8_0": (Part("codes", 32), Part("scales", 2)),
    "Q4_0": (_NIBBLES, Part("scales", 2)),
    "Q4_1": (_NIBBLES, Part("scales", 4)),
    "Q5_0": (_NIBBLES, _FIFTH, Part("scales", 2)),
    "Q5_1": (_NIBBLES, _FIFTH, Part("scales", 4)),
    "Q2_K": (_PAIRS, Part("scales", 2), _TWO_F16),
    "Q3_K": (_PAIRS, _FIFTH, Part("scales", 2), _F16),
    "Q4_K": (_NIBBLES, Part("scales", 2), _TWO_F16),
    "Q5_K": (_NIBBLES, _FIFTH, Part("scales", 2), _TWO_F16),
    "Q6_K": (_NIBBLES, Part("high", 8), Part("scales", 2), _F16),
    "IQ4_NL": (_NIBBLES, Part("scales", 2)),
    "IQ4_XS": (_NIBBLES, Part("scales", 1), _F16),
    "MXFP4": (_NIBBLES, Part("scales", 1)),
}
RARE = ("Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS")
FLOATS = {"F32": 4, "F16": 2, "BF16": 2}  # -> bytes of a value


def packed_type(dtype: DType) -> str:
    """The format a weight of this type is packed as: its own, or float32."""
    name = dtype.name.upper()
    return name if name in FORMATS or name in FLOATS else "F32"


def parts(format: str, inner: int) -> dict[str, int]:
    """Name -> first byte of each part in a packed row; the bytes of a row under ""."""
    if format in FLOATS:
        return {"codes": 0, "": float_nbytes(inner, FLOATS[format])}
    found, at, cuts = {}, 0, cut(inner)
    for part in FORMATS[format]:
        found[part.name] = at
        count = -(-cuts.places // part.blocks)
        at += -(-count * part.nbytes // PIECE) * PIECE
    return found | {"": -(-at // (2 * PIECE)) * 2 * PIECE}


def float_nbytes(inner: int, size: int = 4) -> int:
    """Bytes of a row of floats, filled up."""
    return -(-inner // UNIT) * UNIT * size


def float_lanes(inner: int) -> int:
    """Into how many stretches the sum over a row of floats is cut."""
    return 1 << max(1, min(32, -(-inner // UNIT) // 2)).bit_length() - 1


def row_nbytes(format: str, inner: int) -> int:
    """Bytes of a row of a packed matrix."""
    return parts(format, inner)[""]


def packed_nbytes(format: str, rows: int, inner: int) -> int:
    """Bytes of a packed matrix."""
    return rows * row_nbytes(format, inner)


def column_nbytes(inner: int, coding: str = "int8") -> int:
    """Bytes of a column of packed activations."""
    return cut(inner).places * (BLOCK + 8) if coding == "int8" else float_nbytes(inner)


def pack(raw: np.ndarray, format: str, rows: int, inner: int) -> np.ndarray:
    """A matrix of the file, its rows one after another as uint8, as kernels read it: uint8.

    BackendError: `raw` is not as many bytes as that.
    """
    dtype = DTYPES[format.lower()]
    if raw.dtype != np.uint8 or raw.size != rows * inner // dtype.block * dtype.nbytes:
        raise BackendError(
            f"{rows} rows of {inner} values in {format} are not {raw.dtype} {list(raw.shape)}"
        )
    places = parts(format, inner)
    out = np.zeros((rows, places[""]), np.uint8)
    if format in FLOATS:
        out[:, : inner * FLOATS[format]] = raw.reshape(rows, -1)
        return out.reshape(-1)
    described, cuts = BLOCK_FORMATS[format.lower()], cut(inner)
    blocks = raw.reshape(-1).view(struct_of(described))
    for part in FORMATS[format]:
        found = _MAKERS[part.name](described, blocks).reshape(rows, -1, part.nbytes)
        planes = _by_place(found, cuts) if part.blocks == 1 else found
        at = places[part.name]
        out[:, at : at + planes[0].size] = planes.reshape(rows, -1)
    return out.reshape(-1)


def _by_place(found: np.ndarray, cuts: Cut) -> np.ndarray:
    """[rows, blocks, bytes] -> [rows, planes, places, bytes of a piece or less]."""
    rows, _, nbytes = found.shape
    width = min(nbytes, PIECE)
    out = np.zeros((rows, nbytes // width, cuts.places, width), np.uint8)
    order = cuts.order()
    there = order < cuts.blocks
    out[:, :, there] = found.reshape(rows, -1, nbytes // width, width).swapaxes(1, 2)[
        :, :, order[there]
    ]
    return out


def _codes(described: BlockFormat, blocks: np.ndarray) -> np.ndarray:
    codes = _numbers(described, described.codes, blocks)
    if described.name == "q8_0":
        return codes.view(np.uint8)
    if described.name in ("q2_k", "q3_k"):
        return _as_pairs(codes & 3)
    low, high = codes[..., :16] & 15, codes[..., 16:] & 15
    if not described.levels:
        return low | high << 4
    quads = np.concatenate([low.reshape(-1, 4, 4), high.reshape(-1, 4, 4)], -1)
    return quads[..., ::2] | quads[..., 1::2] << 4


def _high(described: BlockFormat, blocks: np.ndarray) -> np.ndarray:
    codes = _numbers(described, described.codes, blocks)
    if described.name == "q6_k":
        return _as_pairs(codes >> 4)
    bits = codes >> (2 if described.name == "q3_k" else 4)
    places = np.arange(8, dtype=np.uint8).reshape(2, 4, 1)  # w + 4 h
    return np.bitwise_or.reduce(bits.reshape(-1, 8, 4) << places.reshape(8, 1), 1)


def _as_pairs(values: np.ndarray) -> np.ndarray:
    """uint8 [n, 32] below 4 -> [n, 8]."""
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(values.reshape(-1, 2, 4, 4) << shifts, 2).reshape(-1, 8)


def _scales(described: BlockFormat, blocks: np.ndarray) -> np.ndarray:
    name, scale, minimum = described.name, described.scale, described.minimum
    if name == "q2_k":
        return blocks["scales"]
    if not scale.steps:
        fields = (scale.base, minimum.base) if minimum else (scale.base,)
        return np.concatenate([blocks[f].view(np.uint8) for f in map(str, fields)], -1)
    steps = numbers(described, scale.steps, blocks).astype(np.int8) + np.int8(scale.plus)
    if not minimum:
        return steps.view(np.uint8)
    assert minimum.steps
    return np.stack([steps.view(np.uint8), numbers(described, minimum.steps, blocks)], -1)


def _supers(described: BlockFormat, blocks: np.ndarray) -> np.ndarray:
    fields = ("d", "dmin") if described.minimum else ("d",)
    return np.concatenate([blocks[f].view(np.uint8) for f in fields], -1)


_MAKERS = {"codes": _codes, "high": _high, "scales": _scales, "supers": _supers}


def _numbers(described: BlockFormat, number: Number, blocks: np.ndarray) -> np.ndarray:
    """Numbers of a format's blocks as [blocks of 32, 32]."""
    return numbers(described, number, blocks).reshape(-1, BLOCK)


def quantize(x: np.ndarray) -> np.ndarray:
    """float32 [columns, k] -> packed activations uint8 [columns, column_nbytes].

    Per block scale = max |x| / 127, values to the nearest integer.
    """
    (columns, k), cuts = x.shape, cut(x.shape[1])
    padded = np.zeros((columns, cuts.places * BLOCK), np.float32)
    padded[:, :k] = x
    blocks = padded.reshape(columns, -1, BLOCK)[:, cuts.order()]
    scales = np.abs(blocks).max(2) / np.float32(127)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    quants = np.rint(blocks * inverse[..., None]).astype(np.int8)
    halves = quants.reshape(columns, -1, 2, PIECE)
    sums = -halves.astype(np.int16).sum(3, dtype=np.int16)
    meta = np.stack([scales.view(np.uint32), sums.view(np.uint32)[..., 0]], -1)
    planes = halves.swapaxes(1, 2).reshape(columns, -1).view(np.uint8)
    return np.concatenate([planes, meta.reshape(columns, -1).view(np.uint8)], 1)


def turns_of(frequencies: np.ndarray) -> np.ndarray:
    """float32 [half, 2]: frequency / 2 pi, and what its rounding left (for `rope_angles`)."""
    turns = frequencies.astype(np.float64) / (2 * np.pi)
    high = turns.astype(np.float32)
    return np.stack([high, (turns - high).astype(np.float32)], -1)
