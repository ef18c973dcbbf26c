"""Rows of float32 to the blocks of a GGUF type, on all threads.

The types are those with a kernel `quantise_TYPE` in `backends/cpu/kernels`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from runtime.backends.base import Progress
from runtime.backends.cpu.compile.library import Library, library
from runtime.backends.cpu.kernels import KERNELS
from runtime.backends.cpu.run.cores import physical_cores
from runtime.backends.cpu.run.executor import ThreadTeam
from runtime.backends.cpu.run.table import Table
from runtime.backends.cpu.run.weights import aligned
from runtime.backends.plan.kernel import Kernel
from runtime.ops.dtypes import DTYPES, F32, DType, nbytes_for
from runtime.ops.errors import OpError, OptionError

_PREFIX = "quantise_"
_MAGNITUDE = Kernel.of("magnitude")
_PIECE = 4 << 20  # elements quantised at a time: an interrupt waits for one
_HALF = 65504  # the largest float16
_RANGE = {"q8_0": 127 * _HALF, "q5_0": 16 * _HALF, "q4_0": 8 * _HALF}
_WIDER = ("bf16", "mxfp4")  # without a float16
# What an error weighs in every column, beside its importance (1 in the mean): an importance that
# was measured on some text is no licence to leave the other columns alone. The more where a type
# has fewer ways to follow.
_EVEN = {"q4_0": 0.6, "q5_0": 0.6, "mxfp4": 0.6}


def quantisable() -> list[str]:
    """Names of the types that rows can be quantised to, as `DTYPES` has them."""
    return [name[len(_PREFIX) :] for name in KERNELS.names() if name.startswith(_PREFIX)]


def quantise(
    rows: np.ndarray, kind: str | DType, importance: np.ndarray | None = None,
    threads: int | None = None,
) -> np.ndarray:  # fmt: skip
    """One `Quantiser` for one call: see there."""
    with Quantiser(threads) as quantiser:
        return quantiser(rows, kind, importance)


class Quantiser:
    """Quantises rows; keeps its threads from call to call. A context manager, or `close()` it.

    threads: None for one on each core. kernels: another library than that of this machine.
    """

    def __init__(self, threads: int | None = None, kernels: Library | None = None) -> None:
        self._library = kernels or library()
        self._team = ThreadTeam(threads or physical_cores(), self._library.address)
        self._peaks = aligned(64 * self._team.n_threads).view(np.int32)

    def prepare(self, kinds: list[str | DType], progress: Progress | None = None) -> None:
        """Compile what these types need. OptionError: a type has no quantiser."""
        kernels = [_kernel(dtype) for dtype in map(_dtype, kinds) if dtype is not F32]
        self._library.prepare([Kernel.of("executor"), _MAGNITUDE, *kernels], progress)

    def __call__(
        self, rows: np.ndarray, kind: str | DType, importance: np.ndarray | None = None
    ) -> np.ndarray:
        """The rows in blocks, uint8 [R, bytes of a row].

        rows: float32 [R, K], contiguous. kind: "q4_k", "Q4_K" or a DType. importance: float32 [K],
        what a squared error in each column weighs (an importance matrix has the mean square of
        what the column is multiplied with); None for all alike. The bytes of a row depend on
        nothing but the row, its type and the importance.

        OptionError: the type has no quantiser. OpError: rows or importance are not of that kind,
        K is not a whole number of blocks, or a value is NaN, infinite, or more than the type holds;
        an importance is negative, NaN or infinite.
        """
        dtype = _dtype(kind)
        _check(rows, dtype, importance)
        weights = None if importance is None else _weights(dtype, importance)
        n_rows, n_columns = rows.shape
        out = np.empty((n_rows, nbytes_for(dtype, (n_columns,))), np.uint8)
        if dtype is F32:
            out.view(np.float32)[:] = rows
        step = max(1, _PIECE // max(1, n_columns))
        for first in range(0, n_rows if out.size else 0, step):
            piece = rows[first : first + step]
            self._check_range(piece, first, dtype)
            if dtype is not F32:
                at = 0 if weights is None else weights.ctypes.data
                given = [piece.ctypes.data, at, out[first:].ctypes.data, *piece.shape]
                self._run(_kernel(dtype), given)
        return out

    def close(self) -> None:
        """End the threads."""
        self._team.close()

    def __enter__(self) -> Quantiser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, kernel: Kernel, arguments: list[int]) -> None:
        table = Table.single(self._library.address(kernel), arguments)
        self._team.run(*table.records())

    def _check_range(self, rows: np.ndarray, first: int, dtype: DType) -> None:
        """OpError: a value is none, or the type does not reach as far. first: number of row 0."""
        self._run(_MAGNITUDE, [rows.ctypes.data, self._peaks.ctypes.data, rows.size])
        most = _RANGE.get(dtype.name, math.inf if dtype.name in _WIDER or dtype is F32 else _HALF)
        peak = float(self._peaks.max().view(np.float32))
        if peak <= most and peak < math.inf:
            return
        with np.errstate(invalid="ignore"):
            row, column = np.argwhere(~(np.abs(rows) < math.inf) | (np.abs(rows) > most))[0]
        value, where = rows[row, column], f"row {first + row}, column {column}"
        why = f"{dtype} holds up to {most:g}" if np.isfinite(value) else "no type holds that"
        raise OpError(f"{where}: the value is {value:g}; {why}")


def _weights(dtype: DType, importance: np.ndarray) -> np.ndarray:
    """Importance as kernels take it: 1 in the mean, and something for every column."""
    wide = importance.astype(np.float64)
    if not (wide >= 0).all() or not np.isfinite(wide).all():
        raise OpError(f"{dtype}: an importance is negative, or no number")
    return (wide / (wide.mean() or 1) + _EVEN.get(dtype.name, 0.25)).astype(np.float32)


def _dtype(kind: str | DType) -> DType:
    name = str(kind).lower()
    if name != F32.name and name not in quantisable():
        known = ", ".join(sorted(n.upper() for n in (F32.name, *quantisable())))
        raise OptionError(f"no rows can be quantised to {str(kind)!r}; the types are {known}")
    return DTYPES[name]


def _kernel(dtype: DType) -> Kernel:
    return Kernel.of(_PREFIX + dtype.name)


def _check(rows: Any, dtype: DType, importance: Any) -> None:
    for what, array, axes in (("rows", rows, 2), ("importance", importance, 1)):
        if array is importance is None:
            continue
        fits = isinstance(array, np.ndarray) and array.dtype == np.float32 and array.ndim == axes
        if not (fits and array.flags.c_contiguous):
            raise OpError(f"{dtype}: {what} must be contiguous float32 of {axes} axes")
    if importance is not None and importance.shape != rows.shape[1:]:
        raise OpError(
            f"{dtype}: importance of {len(importance)} columns for rows of {rows.shape[1]}"
        )
