"""Kernels called by tests: compiled once a session, run thread after thread on fenced memory."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from typing import Any

import numpy as np

from runtime.backends.cpu.isa import selected
from runtime.backends.cpu.kernel import Kernel
from runtime.backends.cpu.library import Library
from runtime.backends.cpu.objects import function
from runtime.backends.cpu.signatures import SIGNATURES, float_bits

CANARY = 0x7FC0DEAD  # a NaN as float32, no index as int32
ISAS = tuple(dict.fromkeys((selected(), "generic")))  # with FMA and without, on x86
_BEFORE = 16  # elements


@functools.cache
def library(isa: str) -> Library:
    """Compiled kernels of this test session; nothing is kept on disk."""
    return Library(isa, None)


class Fenced:
    """`values` [rows, n] of four bytes each, `stride` elements apart, at the very end of memory.

    Everything is the canary at first; on POSIX systems a touch beyond the last element crashes.
    """

    def __init__(self, rows: int, n: int, stride: int = 0, dtype: Any = np.float32) -> None:
        self.n, self.stride = n, stride or n
        count = _BEFORE + (max(rows - 1, 0) * self.stride + n if rows else 0)
        self.flat = _guarded(count)
        self.flat[:] = CANARY
        shape, strides = (rows, n), (4 * self.stride, 4)
        start = self.flat[_BEFORE:].view(dtype)
        self.values = np.lib.stride_tricks.as_strided(start, shape, strides)

    @classmethod
    def of(cls, values: np.ndarray, stride: int = 0) -> Fenced:
        """A copy of [rows, n] float32 or int32."""
        rows, n = values.shape
        made = cls(rows, n, stride, values.dtype)
        made.values[:] = values
        return made

    @property
    def address(self) -> int:
        return self.flat.ctypes.data + 4 * _BEFORE

    def strays(self, live: int) -> int:
        """How many elements outside the first `live` rows are no longer the canary."""
        inside = np.zeros(self.flat.size, bool)
        for row in range(live):
            start = _BEFORE + row * self.stride
            inside[start : start + self.n] = True
        return int(np.count_nonzero(self.flat[~inside] != CANARY))


def _guarded(count: int) -> np.ndarray:
    """uint32 memory whose end is the end of a page, before one that may not be touched."""
    page = mmap.PAGESIZE
    used = -(-4 * count // page) * page
    memory = mmap.mmap(-1, used + page)
    whole = np.frombuffer(memory, np.uint8)
    if sys.platform != "win32":
        guard = ctypes.c_void_p(whole.ctypes.data + used)
        refused = ctypes.CDLL(None).mprotect(guard, ctypes.c_size_t(page), 0)
        assert not refused, "mprotect refused the guard page"
    return whole[used - 4 * count : used].view(np.uint32)


def run(
    kernel: Kernel, isa: str = ISAS[0], threads: int = 1, only: int = -1, **arguments: Any
) -> None:
    """Call a kernel once per thread number, or as thread `only` alone.

    `live` is the number itself; floats are passed as their bits.
    """
    live = np.array([arguments.get("live", 0)], np.int64)
    words = {name: _word(value) for name, value in arguments.items()}
    if "live" in words:
        words["live"] = live.ctypes.data
    assert set(words) == set(SIGNATURES[kernel.name]), f"arguments of {kernel.name}"
    table = np.array([words[name] for name in SIGNATURES[kernel.name]], np.int64)
    entry = function(library(isa).address(kernel))
    for thread in range(threads) if only < 0 else [only]:
        entry(table.ctypes.data, thread, threads)


def _word(value: Any) -> int:
    if isinstance(value, Fenced):
        return value.address
    if isinstance(value, np.ndarray):
        return value.ctypes.data
    return float_bits(value) if isinstance(value, float) else int(value)
