"""Weights in the forms that kernels read: file bytes, float32 vectors, packed tiles.

Packing runs on all threads, tensor by tensor; the file's pages are given back to the system
afterwards, so a model never lies in memory twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from runtime.backends.cpu.kernel import Kernel
from runtime.backends.cpu.library import Library
from runtime.backends.cpu.plan import ALIGNMENT, Buffer
from runtime.backends.cpu.rewrite import tile_format
from runtime.backends.cpu.table import Table
from runtime.backends.cpu.tile.formats import packed_nbytes
from runtime.ops.quants import dequantize
from runtime.ops.tensor import Tensor, stored_name

_CHUNK = 64 << 20  # bytes of float32 made at a time from types without a tile format


def aligned_empty(nbytes: int) -> np.ndarray:
    """uint8 [nbytes], uninitialised, starting at a cache line."""
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes]


class WeightStore:
    """The weights of one model on this device, made on first use."""

    def __init__(self, file: Any, library: Library, team: Any) -> None:
        self._file, self._library, self._team = file, library, team
        self._made: dict[tuple[str, str], np.ndarray] = {}
        self._slab = aligned_empty(0)

    def address(self, buffer: Buffer) -> int:
        """Where a weight lies in the form its buffer asks for."""
        key = (buffer.kind, buffer.key)
        if key not in self._made:
            assert buffer.tensor is not None, "a weight buffer has its tensor"
            self._made[key] = _MAKERS[buffer.kind](self, buffer.tensor)
        return self._made[key].ctypes.data

    def nbytes(self) -> int:
        """Bytes of memory taken, the file's own pages aside."""
        return sum(a.nbytes for (kind, _), a in self._made.items() if kind != "raw")

    def stored_nbytes(self, buffers: Iterable[Buffer]) -> int:
        """Bytes of the file that `load` reads for these buffers."""
        return sum(map(_stored_nbytes, buffers))

    def load(self, buffers: Iterable[Buffer]) -> Iterator[int]:
        """Make all; yields the file bytes finished after each tensor.

        Packed weights lie in one piece of memory, which the system then maps with large pages:
        reading them is a third faster than from many small pieces (measured).
        """
        wanted = [b for b in buffers if (b.kind, b.key) not in self._made]
        packed = [_packed_nbytes(b.tensor) for b in wanted if b.kind == "packed" and b.tensor]
        self._slab = aligned_empty(sum(-(-n // ALIGNMENT) * ALIGNMENT for n in packed))
        for buffer in wanted:
            self.address(buffer)
            yield _stored_nbytes(buffer)

    def _raw(self, w: Tensor) -> np.ndarray:
        """The stored bytes, uint8; a copy where the weight takes some of the tensor's rows."""
        source = self._file.tensors[stored_name(w)]
        if not (runs := w.attrs.get("rows")):
            return source.data
        axis = w.ndim + w.attrs["axis"]
        before, inner = math.prod(w.shape[:axis]), math.prod(w.shape[axis + 1 :])
        rows = source.data.reshape(before, -1, inner // w.dtype.block * w.dtype.nbytes)
        return np.concatenate([rows[:, a:b] for a, b in runs], axis=1).reshape(-1)

    def _vector(self, w: Tensor) -> np.ndarray:
        return np.ascontiguousarray(dequantize(self._raw(w), w.dtype, w.shape), np.float32)

    def _packed(self, w: Tensor) -> np.ndarray:
        """Tiles of a matrix [rows, inner], or of the matrices of all experts one after another."""
        raw = self._raw(w)
        out = self._take(_packed_nbytes(w))
        if tile_format(w.dtype) == w.dtype.name.upper():
            self._pack(w, raw, out, _matrix(w)[0], _experts(w))
        else:
            self._pack_widened(w, raw, out)
        self._file.drop_pages(self._file.tensors[stored_name(w)])
        return out

    def _take(self, nbytes: int) -> np.ndarray:
        """Memory from the slab, or of its own for a weight that comes later."""
        if nbytes > self._slab.nbytes:
            return aligned_empty(nbytes)
        out = self._slab[:nbytes]
        self._slab = self._slab[-(-nbytes // ALIGNMENT) * ALIGNMENT :]
        return out

    def _pack_widened(self, w: Tensor, raw: np.ndarray, out: np.ndarray) -> None:
        """As float32, some rows at a time."""
        (rows, inner), size = _matrix(w), out.nbytes // _experts(w)
        step = max(16, _CHUNK // (4 * inner) // 16 * 16)
        row_nbytes = raw.nbytes // (rows * _experts(w))
        for expert in range(_experts(w)):
            for first in range(0, rows, step):
                count = min(step, rows - first)
                start = (expert * rows + first) * row_nbytes
                chunk = raw[start : start + count * row_nbytes]
                wide = np.ascontiguousarray(dequantize(chunk, w.dtype, (count, inner)), np.float32)
                at = expert * size + packed_nbytes("F32", first, inner)
                self._pack(w, wide.view(np.uint8).reshape(-1), out[at:], count, 1)

    def _pack(self, w: Tensor, raw: np.ndarray, out: np.ndarray, rows: int, matrices: int) -> None:
        name, inner = tile_format(w.dtype), _matrix(w)[1]
        kernel = Kernel.of("pack_weights", format=name)
        each = raw.nbytes // matrices
        arguments = [
            raw.ctypes.data, out.ctypes.data, rows, inner, each // rows, matrices, each,
            packed_nbytes(name, rows, inner),
        ]  # fmt: skip
        table = Table.single(self._library.address(kernel), arguments)
        self._team.run(*table.records())


def _matrix(w: Tensor) -> tuple[int, int]:
    return int(w.shape[-2]), int(w.shape[-1])


def _stored_nbytes(buffer: Buffer) -> int:
    return buffer.tensor.nbytes if buffer.tensor is not None else 0


def _packed_nbytes(w: Tensor) -> int:
    return _experts(w) * packed_nbytes(tile_format(w.dtype), *_matrix(w))


def _experts(w: Tensor) -> int:
    return int(w.shape[0]) if w.ndim == 3 else 1


_MAKERS = {
    "raw": WeightStore._raw,
    "vector": WeightStore._vector,
    "packed": WeightStore._packed,
}
