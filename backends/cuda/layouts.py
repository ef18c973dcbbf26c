"""How weights and activations lie in GPU memory, and packing them with numpy.

A row is cut into blocks of 32 values along k. 16 bytes are a piece. Shapes, outermost first:

    Q8_0  quants [row, half, block] pieces: 16 int8 of each half   scales f16 [row, block]
    Q4_0  quants [row, block] pieces: low nibbles are the first    scales f16 [row, block]
          half, high ones the second, value = nibble - 8
    Q4_K  quants [row, block] pieces as Q4_0, block = eighth     scales u16 [row, block]: scale
          of the super-block, value = d s nibble - dmin m        and minimum, 6 bits each in a byte
                                                                 supers [row, block / 8] f16 d, dmin
    Q6_K  quants [row, block] pieces: low 4 bits as Q4_0         scales u16 [row, block]: int8 of
          pairs [row, block] of 8 bytes: bits 4 and 5;           the first and the second half
          word = half, bits 2 w + 8 j of value 4 w + j           supers f16 [row, block / 8]
    activations  x [column, half, block] pieces of int8
                 meta [column, block] of (f32 scale, two int16: the negated sums of the halves)

A piece of consecutive blocks lies beside the next, so the lanes of a warp read 512 bytes at once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from runtime.ops.blocks import BLOCK_FORMATS, BlockFormat, Number
from runtime.ops.dtypes import DTYPES, DType
from runtime.ops.errors import BackendError
from runtime.ops.quant_blocks import numbers, struct_of

BLOCK = 32  # values
ALIGNMENT = 256  # bytes, of each part of a packed weight


class Part(NamedTuple):
    """One array of a packed weight: `nbytes` for each `values` values of a row."""

    name: str
    nbytes: int
    values: int


FORMATS = {
    "Q8_0": (Part("weights", 32, 32), Part("scales", 2, 32)),
    "Q4_0": (Part("weights", 16, 32), Part("scales", 2, 32)),
    "Q4_K": (Part("weights", 16, 32), Part("scales", 2, 32), Part("supers", 4, 256)),
    "Q6_K": (
        Part("weights", 16, 32), Part("pairs", 8, 32), Part("scales", 2, 32),
        Part("supers", 2, 256),
    ),
    "F32": (Part("weights", 4, 1),),
}  # fmt: skip


def packed_type(dtype: DType) -> str:
    """The format a weight of this type is packed as: its own, or float32."""
    name = dtype.name.upper()
    return name if name in FORMATS else "F32"


def parts(format: str, rows: int, inner: int) -> dict[str, int]:
    """Name -> first byte of each part of a packed matrix; the end under ""."""
    found, at = {}, 0
    for part in FORMATS[format]:
        found[part.name] = at
        at += -(-rows * (inner // part.values) * part.nbytes // ALIGNMENT) * ALIGNMENT
    return found | {"": at}


def packed_nbytes(format: str, rows: int, inner: int) -> int:
    """Bytes of a packed matrix."""
    return parts(format, rows, inner)[""]


def meta_offset(columns: int, inner: int) -> int:
    """Where the scales of packed activations begin."""
    return -(-columns * inner // ALIGNMENT) * ALIGNMENT


def activations_nbytes(columns: int, inner: int) -> int:
    """Bytes of packed activations."""
    return meta_offset(columns, inner) + columns * inner // BLOCK * 8


def columns_of(tokens: int) -> int:
    """Columns of a product that share the reading of a weight: 1, 2, 4 or 8, more in turns."""
    return next((n for n in (1, 2, 4) if tokens <= n), 8)


def pack(raw: np.ndarray, format: str, rows: int, inner: int) -> np.ndarray:
    """A matrix of the file, its rows one after another as uint8, as kernels read it: uint8."""
    out = np.zeros(packed_nbytes(format, rows, inner), np.uint8)
    if format == "F32":
        out[: raw.nbytes] = raw.reshape(-1)
        return out
    make = {"Q8_0": pack_q8_0, "Q4_0": pack_q4_0, "Q4_K": pack_q4_k, "Q6_K": pack_q6_k}[format]
    size = DTYPES[format.lower()]
    made = make(raw.reshape(rows, inner // size.block, size.nbytes))
    for (name, at), array in zip(parts(format, rows, inner).items(), made, strict=False):
        assert name, "as many arrays as parts"
        out[at : at + array.nbytes] = array.reshape(-1).view(np.uint8)
    return out


def pack_q8_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """GGUF blocks uint8 [rows, n, 34] -> quants uint8 [rows, 2, n, 16], scales uint16 [rows, n]."""
    blocks = _checked(blocks, 34)
    quants = blocks[..., 2:].reshape(*blocks.shape[:2], 2, 16).swapaxes(1, 2)
    return np.ascontiguousarray(quants), _u16(blocks[..., :2])


def pack_q4_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """GGUF blocks uint8 [rows, n, 18] -> quants uint8 [rows, n, 16], scales uint16 [rows, n]."""
    blocks = _checked(blocks, 18)
    return np.ascontiguousarray(blocks[..., 2:]), _u16(blocks[..., :2])


def pack_q4_k(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """GGUF blocks uint8 [rows, n, 144] -> quants uint8 [rows, 8 n, 16], scales uint16 [rows, 8 n],
    supers uint32 [rows, n]."""
    described = BLOCK_FORMATS["q4_k"]
    assert described.scale.steps and described.minimum and described.minimum.steps
    supers = np.ascontiguousarray(_checked(blocks, 144)[..., :4]).view(np.uint32)[..., 0]
    codes = _numbers(blocks, described, described.codes)
    scales = _numbers(blocks, described, described.scale.steps).astype(np.uint16)
    minima = _numbers(blocks, described, described.minimum.steps).astype(np.uint16)
    return _nibble_pieces(codes.reshape(len(blocks), -1, 32)), scales | minima << 8, supers


def _numbers(blocks: np.ndarray, row: BlockFormat, number: Number) -> np.ndarray:
    """Numbers of a format's blocks [rows, n, bytes] as [rows, numbers of a row]."""
    flat = np.ascontiguousarray(blocks).reshape(-1).view(struct_of(row))
    return numbers(row, number, flat).reshape(len(blocks), -1)


def pack_q6_k(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """GGUF blocks uint8 [rows, n, 210] -> quants uint8 [rows, 8 n, 16], pairs uint8 [rows, 8 n, 8],
    scales uint16 [rows, 8 n], supers uint16 [rows, n]."""
    described = BLOCK_FORMATS["q6_k"]
    codes = _numbers(_checked(blocks, 210), described, described.codes).reshape(len(blocks), -1, 32)
    high = (codes >> 4).reshape(*codes.shape[:2], 2, 4, 4)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    pairs = np.bitwise_or.reduce(high << shifts, 3).reshape(*codes.shape[:2], 8)
    scales = _u16(blocks[..., 192:208].reshape(*codes.shape[:2], 2))
    return _nibble_pieces(codes & 15), pairs, scales, _u16(blocks[..., 208:])


def _nibble_pieces(values: np.ndarray) -> np.ndarray:
    """uint8 [..., 32] below 16 -> [..., 16]: the first half in the low nibbles."""
    return values[..., :16] | values[..., 16:] << 4


def quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [columns, k] -> packed activations: x uint8 [columns, 2, n, 16], meta uint32.

    Per block scale = max |x| / 127, values to the nearest integer; meta is [columns, n, 2]. The
    last block is filled up with zeros.
    """
    columns, k = x.shape
    padded = np.zeros((columns, -(-k // BLOCK) * BLOCK), np.float32)
    padded[:, :k] = x
    blocks = padded.reshape(columns, -1, 2, 16)
    scales = np.abs(blocks).max((2, 3)) / np.float32(127)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    quants = np.rint(blocks * inverse[..., None, None]).astype(np.int8)
    sums = -quants.astype(np.int16).sum(3, dtype=np.int16)
    meta = np.stack([scales.view(np.uint32), sums.view(np.uint32)[..., 0]], -1)
    return np.ascontiguousarray(quants.swapaxes(1, 2)).view(np.uint8), meta


def dequantized(x: np.ndarray, meta: np.ndarray) -> np.ndarray:
    """The values of packed activations, float64 [columns, 32 n]: what kernels multiply with."""
    columns, _, n, _ = x.shape
    scales = meta[..., 0].copy().view(np.float32).astype(np.float64)
    quants = x.view(np.int8).swapaxes(1, 2).reshape(columns, n, BLOCK)
    return (quants * scales[..., None]).reshape(columns, -1)


def _checked(blocks: np.ndarray, nbytes: int) -> np.ndarray:
    if blocks.dtype != np.uint8 or blocks.ndim != 3 or blocks.shape[2] != nbytes:
        raise BackendError(
            f"weights to pack are uint8 [rows, blocks, {nbytes}], not {blocks.dtype} "
            f"{list(blocks.shape)}"
        )
    return blocks


def _u16(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view(np.uint16)[..., 0]


def turns_of(frequencies: np.ndarray) -> np.ndarray:
    """float32 [half, 2]: frequency / 2 pi, and what its rounding left (for `rope_angles`)."""
    turns = frequencies.astype(np.float64) / (2 * np.pi)
    high = turns.astype(np.float32)
    return np.stack([high, (turns - high).astype(np.float32)], -1)
