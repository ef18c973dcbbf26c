"""New tensors made of rows of a checkpoint's, piece by piece: never a whole one in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from runtime.conversion.checkpoint import Stored
from runtime.ops.dtypes import BF16, F16, F32, MXFP4, Q8_0, DType
from runtime.ops.errors import FileError, OpError

_PIECE = 8 << 20  # bytes of a checkpoint that are read at a time
_HALF = 65504  # the largest float16
Change = Callable[[np.ndarray], np.ndarray]
Quantise = Callable[[np.ndarray, DType], np.ndarray]


class Matrix(Protocol):
    """What rows can be taken of: a stored tensor, or several that make one."""

    @property
    def label(self) -> str:
        """Tensor and file, for messages."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor; rows are all axes but the last, or single numbers."""
        ...

    @property
    def row_bytes(self) -> int:
        """Bytes that are read for a row."""
        ...

    def take(self, index: np.ndarray) -> np.ndarray:
        """The rows of these numbers [n, width]."""
        ...


def rows_of(matrix: Matrix) -> int:
    """How many rows there are."""
    shape = matrix.shape
    return math.prod(shape[:-1] if len(shape) > 1 else shape)


class Rows(NamedTuple):
    """Rows of a matrix in an order, each changed on its own, or all `at_once`."""

    matrix: Matrix
    order: Sequence[int] | np.ndarray
    change: Change | None = None
    at_once: bool = False

    def pieces(self) -> Iterator[np.ndarray]:
        """The rows, some at a time."""
        step = len(self.order) if self.at_once else max(1, _PIECE // max(1, self.matrix.row_bytes))
        for at in range(0, len(self.order), max(1, step)):
            found = self.matrix.take(np.asarray(self.order[at : at + step], np.int64))
            yield self.change(found) if self.change else found


class Planned(NamedTuple):
    """A tensor of the new file. dtype: None for what the file's type and its name give it."""

    name: str
    shape: tuple[int, ...]
    rows: Sequence[Rows]
    dtype: DType | None = None

    def chunks(self, dtype: DType, quantise: Quantise) -> Iterator[np.ndarray]:
        """Its bytes in the file. FileError: a value that the type does not hold."""
        for rows in self.rows:
            for piece in rows.pieces():
                try:
                    yield np.ascontiguousarray(_encoded(piece, dtype, quantise))
                except OpError as error:
                    raise FileError(
                        f"{rows.matrix.label} cannot be {dtype} ({error}); choose the type bf16 "
                        "or f32"
                    ) from None


def floats(stored: np.ndarray) -> np.ndarray:
    """Stored numbers as float32; 16 bits without a type are brain floats."""
    if stored.dtype == np.uint16:
        bits = stored.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    return stored.astype(np.float32, copy=False)


def _encoded(piece: np.ndarray, dtype: DType, quantise: Quantise) -> np.ndarray:
    if dtype in (MXFP4, F16, BF16, F32) and piece.dtype == (dtype.numpy or np.uint8):
        return piece
    values = floats(piece)
    if dtype is F32:
        return values
    if dtype is Q8_0:
        return quantise(np.ascontiguousarray(values).reshape(-1, piece.shape[-1]), Q8_0)
    if dtype is BF16:
        return _brain(values)
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    if (np.isinf(halves) & np.isfinite(values)).any():
        raise OpError(f"a value is {np.abs(values).max():g}, f16 holds up to {_HALF}")
    return halves


def _brain(values: np.ndarray) -> np.ndarray:
    """The nearest brain floats, ties to even, as their bits."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    kept = np.isnan(values)
    rounded = bits + (0x7FFF + ((bits >> 16) & 1))  # a carry out of the largest is infinity
    return (np.where(kept, bits | 0x400000, rounded) >> 16).astype(np.uint16)


class Scaled(NamedTuple):
    """A matrix of 8-bit floats with a scale for each block of rows and columns."""

    codes: Stored
    scales: Stored
    block: tuple[int, int]

    @property
    def label(self) -> str:
        """Tensor and file, for messages."""
        return self.codes.label

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.codes.shape

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return 4 * self.codes.width

    def take(self, index: np.ndarray) -> np.ndarray:
        """The rows of these numbers as float32 [n, width]."""
        scales = floats(self.scales.take(index // self.block[0]))
        wide = np.repeat(scales, self.block[1], axis=1)[:, : self.codes.width]
        return _E4M3[self.codes.take(index)] * wide


def _e4m3() -> np.ndarray:
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, (codes & 7) / 8
    size = np.where(exponent, (1 + mantissa) * 2.0 ** (exponent - 7), mantissa * 2.0**-6)
    size[127::128] = np.nan
    return np.where(codes < 128, size, -size).astype(np.float32)


_E4M3 = _e4m3()


class Mxfp4(NamedTuple):
    """Rows of 4-bit floats: codes in pairs of neighbours, and a scale for each 32 of them."""

    codes: Stored  # [..., blocks of a row, 16]
    scales: Stored  # [..., blocks of a row]

    @property
    def label(self) -> str:
        """Tensor and file, for messages."""
        return self.codes.label

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor, in numbers."""
        return *self.scales.shape[:-1], self.scales.width * MXFP4.block

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return MXFP4.nbytes * self.scales.width

    def take(self, index: np.ndarray) -> np.ndarray:
        """The rows of these numbers as blocks of a GGUF file, uint8 [n, bytes of a row]."""
        blocks = self.scales.width
        spread = (index[:, None] * blocks + np.arange(blocks)).reshape(-1)
        pairs = self.codes.take(spread).reshape(len(index), blocks, MXFP4.block // 2)
        codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*pairs.shape[:2], MXFP4.block)
        half = MXFP4.block // 2
        out = np.empty((len(index), blocks, MXFP4.nbytes), np.uint8)
        out[..., 0] = self.scales.take(index)
        out[..., 1:] = codes[..., :half] | codes[..., half:] << 4
        return out.reshape(len(index), -1)
