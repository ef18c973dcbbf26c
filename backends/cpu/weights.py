"""Weights in the forms that kernels read: file bytes, float32 vectors, packed tiles.

Packing runs on all threads, tensor by tensor; the file's pages are given back to the system
afterwards, so a model never lies in memory twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from runtime.backends.cpu.kernel import Kernel
from runtime.backends.cpu.library import Library
from runtime.backends.cpu.plan import ALIGNMENT, Buffer
from runtime.backends.cpu.rewrite import tile_format
from runtime.backends.cpu.table import Table
from runtime.backends.cpu.tile.pack import packed_nbytes
from runtime.ops.dtypes import F32
from runtime.ops.quants import dequantize
from runtime.ops.tensor import Tensor

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

    def load(self, buffers: Iterable[Buffer]) -> Iterator[int]:
        """Make all; yields the file bytes finished after each tensor."""
        for buffer in buffers:
            self.address(buffer)
            yield self._file.tensors[buffer.key].nbytes

    def _raw(self, w: Tensor) -> np.ndarray:
        return self._file.tensors[w.name].data

    def _vector(self, w: Tensor) -> np.ndarray:
        return np.ascontiguousarray(self._file.tensors[w.name].to_float32(), np.float32)

    def _packed(self, w: Tensor) -> np.ndarray:
        source, name = self._file.tensors[w.name], tile_format(w.dtype)
        rows, inner = (int(n) for n in w.shape[-2:])
        experts = int(w.shape[0]) if w.ndim == 3 else 1
        size = packed_nbytes(name, rows, inner)
        out = aligned_empty(experts * size)
        each = source.nbytes // experts
        for expert in range(experts):
            raw = source.data[expert * each : (expert + 1) * each]
            self._pack(w, raw, out[expert * size : (expert + 1) * size], rows, inner)
        self._file.drop_pages(source)
        return out

    def _pack(self, w: Tensor, raw: np.ndarray, out: np.ndarray, rows: int, inner: int) -> None:
        name = tile_format(w.dtype)
        if name == w.dtype.name:
            self._run_pack(name, raw, out, rows, inner)
            return
        step = max(16, _CHUNK // (4 * inner) // 16 * 16)
        row_nbytes = raw.nbytes // rows
        for first in range(0, rows, step):
            count = min(step, rows - first)
            chunk = raw[first * row_nbytes : (first + count) * row_nbytes]
            wide = np.ascontiguousarray(dequantize(chunk, w.dtype, (count, inner)), F32.numpy)
            at = packed_nbytes(name, first, inner) if first else 0
            self._run_pack(name, wide.view(np.uint8).reshape(-1), out[at:], count, inner)

    def _run_pack(self, name: str, raw: np.ndarray, out: np.ndarray, rows: int, inner: int) -> None:
        kernel = Kernel.of("pack_weights", format=name)
        arguments = [raw.ctypes.data, out.ctypes.data, rows, inner]
        table = Table.single(self._library.address(kernel), arguments)
        self._team.run(table.address(), len(table))


_MAKERS = {
    "raw": WeightStore._raw,
    "vector": WeightStore._vector,
    "packed": WeightStore._packed,
}
