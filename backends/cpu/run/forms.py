"""The forms in which kernels read weights: file bytes, float32 vectors, repacked tiles.

What a form holds depends on the file, on this module and what it imports, and on the packing
kernels: see `WeightStore`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from runtime.backends.cpu.tile.formats import ROWS, packed_nbytes, tile_format
from runtime.backends.plan.stored import StoredRows
from runtime.ops.quants import dequantize
from runtime.ops.tensor import Tensor

PIECE = 16 << 20  # bytes read, and packed or widened, at a time; an interrupt waits for one

Take = Callable[[int], np.ndarray]
Run = Callable[[str, np.ndarray, np.ndarray, tuple[int, int], int, int], None]  # `_repack`


def raw(w: Tensor, stored: Any, room: np.ndarray) -> np.ndarray:
    """The stored bytes, uint8; of a cut weight those of its part.

    stored: the file's tensor. room: for what is read at a time.
    """
    if "cut" not in w.attrs:
        return np.asarray(stored.data)
    rows = StoredRows(w, stored).read(0, math.prod(w.shape[:-1]), room)
    return rows.copy().reshape(-1)


def vector(w: Tensor, stored: Any, room: np.ndarray) -> np.ndarray:
    """The values as float32."""
    values = dequantize(raw(w, stored, room), w.dtype, w.shape)
    return np.ascontiguousarray(values, np.float32)


def repacked(w: Tensor, stored: StoredRows, room: np.ndarray, take: Take, run: Run) -> np.ndarray:
    """Tiles of a matrix [rows, inner], or of the matrices of all experts one after another.

    take: gives memory for so many bytes.
    """
    out, format = take(repacked_nbytes(w)), tile_format(w.dtype)
    (rows, inner), matrices = _matrix(w), _experts(w)
    each = out.nbytes // matrices
    widened = format != w.dtype.name.upper()
    row_nbytes = 4 * inner if widened else stored.nbytes
    for matrix, count, first, stop in pieces(matrices, rows, row_nbytes):
        found = stored.read(matrix * rows + first, count * (stop - first), room)
        if widened:
            wide = dequantize(np.ascontiguousarray(found), w.dtype, (len(found), inner))
            found = np.ascontiguousarray(wide, np.float32).view(np.uint8)
        to = out[matrix * each + packed_nbytes(format, first, inner) :]
        run(format, found, to, (stop - first, inner), count, each)
    return out


def nbytes_of(form: str, w: Tensor) -> int:
    """Bytes of a weight in a form: raw, vector or repacked."""
    if form == "repacked":
        return repacked_nbytes(w)
    return 4 * w.size if form == "vector" else w.nbytes


def repacked_nbytes(w: Tensor) -> int:
    """Bytes of all tiles of a weight."""
    return _experts(w) * packed_nbytes(tile_format(w.dtype), *_matrix(w))


def pieces(matrices: int, rows: int, row_nbytes: int) -> Iterator[tuple[int, int, int, int]]:
    """(first matrix, how many, first row, end row) of pieces of some MiB of several matrices.

    Several whole matrices, or some rows of one, whole tiles but at its end.
    """
    whole = max(1, PIECE // row_nbytes)  # rows
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


def _experts(w: Tensor) -> int:
    return int(w.shape[0]) if w.ndim == 3 else 1
