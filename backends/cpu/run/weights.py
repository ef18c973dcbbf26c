"""Weights in the forms that kernels read: file bytes, float32 vectors, repacked tiles.

Packing runs on all threads, some MiB of the file at a time, so a model never lies in memory twice.
Nothing of it refers to the file afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import numpy as np

from runtime.backends import forks
from runtime.backends.base import stored_tensor
from runtime.backends.cpu.compile.library import Library
from runtime.backends.cpu.run.cores import pinned
from runtime.backends.cpu.run.table import Table
from runtime.backends.cpu.tile.formats import ROWS, packed_nbytes, tile_format
from runtime.backends.plan.kernel import Kernel
from runtime.backends.plan.plan import ALIGNMENT, Buffer
from runtime.backends.plan.stored import StoredRows
from runtime.ops.quants import dequantize
from runtime.ops.tensor import Tensor

_PIECE = 16 << 20  # bytes read, and packed or widened, at a time; an interrupt waits for one


def aligned(nbytes: int, make: Callable[..., np.ndarray] = np.empty) -> np.ndarray:
    """uint8 [nbytes] starting at a cache line, uninitialised; make: `np.zeros` for zeros."""
    raw = make(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes]


class WeightStore:
    """The weights of one model on this device, made on first use."""

    def __init__(self, file: Any, library: Library, team: Any) -> None:
        self._file, self._library, self._team = file, library, team
        self.cores = team.cores[0]  # they write it first, so that it lies on their NUMA node
        self._made: dict[Hashable, np.ndarray] = {}
        self._rows: dict[Hashable, np.ndarray] = {}  # "raw", of which steps look up few
        self._reading = forks.lock()  # of those
        self._slab = self._room = aligned(0)

    def address(self, buffer: Buffer) -> int:
        """Where a weight lies in the form its buffer asks for."""
        assert buffer.tensor is not None, "a weight buffer has its tensor"
        if buffer.memory == "raw":
            with self._reading:
                return self._address(self._rows, buffer, buffer.tensor)
        return self._address(self._made, buffer, buffer.tensor)

    def _address(self, made: dict[Hashable, np.ndarray], buffer: Buffer, w: Tensor) -> int:
        if buffer.content not in made:
            with pinned(self.cores):
                made[buffer.content] = _MAKERS[buffer.memory](self, w)
        return made[buffer.content].ctypes.data

    def share_rows(self, other: WeightStore) -> None:
        """Rows to look up lie in memory once, for this device and the other."""
        self._rows, self._reading = other._rows, other._reading

    def nbytes(self) -> int:
        """Bytes of memory taken."""
        return sum(a.nbytes for made in (self._made, self._rows) for a in made.values())

    def stored_nbytes(self, buffers: Iterable[Buffer]) -> int:
        """Bytes of the file that `load` reads for these buffers."""
        return sum(map(_stored_nbytes, buffers))

    def load(self, buffers: Iterable[Buffer]) -> Iterator[int]:
        """Make all; yields the file bytes finished after each tensor.

        Packed weights lie in one piece of memory, which the system then maps with large pages:
        reading them is a third faster than from many small pieces (measured).
        """
        wanted = [b for b in buffers if b.content not in self._made]
        packed = [_repacked_nbytes(b.tensor) for b in wanted if b.memory == "repacked" and b.tensor]
        self._slab = aligned(sum(-(-n // ALIGNMENT) * ALIGNMENT for n in packed))
        self._room = aligned(_PIECE)
        for buffer in wanted:
            self.address(buffer)
            yield _stored_nbytes(buffer)
        self._room = aligned(0)

    def _raw(self, w: Tensor) -> np.ndarray:
        """The stored bytes, uint8; of a cut weight those of its part."""
        tensor = stored_tensor(self._file, w)
        if "cut" not in w.attrs:
            return tensor.data
        rows = StoredRows(w, tensor).read(0, math.prod(w.shape[:-1]), self._room)
        return rows.copy().reshape(-1)

    def _vector(self, w: Tensor) -> np.ndarray:
        return np.ascontiguousarray(dequantize(self._raw(w), w.dtype, w.shape), np.float32)

    def _repacked(self, w: Tensor) -> np.ndarray:
        """Tiles of a matrix [rows, inner], or of the matrices of all experts one after another."""
        out, format = self._take(_repacked_nbytes(w)), tile_format(w.dtype)
        (rows, inner), matrices = _matrix(w), _experts(w)
        each, stored = out.nbytes // matrices, self._stored(w)
        widened = format != w.dtype.name.upper()
        row_nbytes = 4 * inner if widened else stored.nbytes
        for matrix, count, first, stop in _pieces(matrices, rows, row_nbytes):
            raw = stored.read(matrix * rows + first, count * (stop - first), self._room)
            if widened:
                wide = dequantize(np.ascontiguousarray(raw), w.dtype, (len(raw), inner))
                raw = np.ascontiguousarray(wide, np.float32).view(np.uint8)
            at = matrix * each + packed_nbytes(format, first, inner)
            self._repack(format, raw, out[at:], (stop - first, inner), count, each)
        return out

    def _stored(self, w: Tensor) -> StoredRows:
        """Rows of a weight, those in memory where an embedding is the output matrix as well."""
        raw = None if "cut" in w.attrs else self._rows.get(("raw", w.content))
        return StoredRows(w, stored_tensor(self._file, w), raw)

    def _take(self, nbytes: int) -> np.ndarray:
        """Memory from the slab, or of its own for a weight that comes later."""
        if nbytes > self._slab.nbytes:
            return aligned(nbytes)
        out = self._slab[:nbytes]
        self._slab = self._slab[-(-nbytes // ALIGNMENT) * ALIGNMENT :]
        return out

    def _repack(
        self, format: str, raw: np.ndarray, out: np.ndarray, shape: tuple[int, int], matrices: int,
        apart: int,
    ) -> None:  # fmt: skip
        """Pack matrices of one shape, rows raw [matrices * rows, bytes] that may lie apart; their
        tiles begin `apart` bytes from each other."""
        (rows, inner), stride = shape, raw.strides[0]
        kernel = Kernel.of("pack_weights", format=format)
        arguments = [
            raw.ctypes.data, out.ctypes.data, rows, inner, stride, matrices, rows * stride, apart,
        ]  # fmt: skip
        table = Table.single(self._library.address(kernel), arguments)
        self._team.run(*table.records())


def _pieces(matrices: int, rows: int, row_nbytes: int) -> Iterator[tuple[int, int, int, int]]:
    """(first matrix, how many, first row, end row) of pieces of some MiB of several matrices.

    Several whole matrices, or some rows of one, whole tiles but at its end.
    """
    whole = max(1, _PIECE // row_nbytes)  # rows
    if whole >= rows:
        step = min(matrices, whole // rows)
        for matrix in range(0, matrices, step):
            yield matrix, min(step, matrices - matrix), 0, rows
        return
    step = max(ROWS, whole // ROWS * ROWS)
    for matrix in range(matrices):
        for first in range(0, rows, step):
            yield matrix, 1, first, min(rows, first + step)


def _matrix(w: Tensor) -> tuple[int, int]:
    return int(w.shape[-2]), int(w.shape[-1])


def _stored_nbytes(buffer: Buffer) -> int:
    return buffer.tensor.nbytes if buffer.tensor is not None else 0


def _repacked_nbytes(w: Tensor) -> int:
    return _experts(w) * packed_nbytes(tile_format(w.dtype), *_matrix(w))


def _experts(w: Tensor) -> int:
    return int(w.shape[0]) if w.ndim == 3 else 1


_MAKERS = {
    "raw": WeightStore._raw,
    "vector": WeightStore._vector,
    "repacked": WeightStore._repacked,
}
