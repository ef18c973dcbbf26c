"""Kernels called by tests: compiled once a session, run thread after thread on fenced memory."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from runtime.backends.cpu.compile.isa import selected
from runtime.backends.cpu.compile.library import Library
from runtime.backends.cpu.compile.objects import function
from runtime.backends.cpu.sizes import float_bits
from runtime.backends.environment import cache_dir
from runtime.backends.plan.kernel import Kernel

CANARY = 0x7FC0DEAD  # a NaN as float32, no index as int32
ISAS = tuple(dict.fromkeys((selected(), "generic")))  # with FMA and without, on x86
_SPARE = 16  # elements on the other side


@functools.cache
def library(isa: str) -> Library:
    """The kernels of an instruction set, compiled once and kept as those of models are."""
    return Library(isa, cache_dir())


class Fenced:
    """`values` [rows, n] of four bytes each, `stride` elements apart, at one end of memory.

    Everything is the canary at first. On POSIX systems a touch beyond the last element crashes, or,
    inside `at_the_front()`, a touch before the first; elsewhere what is written there is found.
    """

    front = False

    def __init__(self, rows: int, n: int, stride: int = 0, dtype: Any = np.float32) -> None:
        self.n, self.stride = n, stride or n
        size = max(rows - 1, 0) * self.stride + n if rows else 0
        self.start = 0 if Fenced.front else _SPARE
        flat, self.beyond = guarded_bytes(4 * (size + _SPARE), Fenced.front)
        self.flat = flat.view(np.uint32)
        self.flat[:] = CANARY
        shape, strides = (rows, n), (4 * self.stride, 4)
        start = self.flat[self.start :].view(dtype)
        self.values = np.lib.stride_tricks.as_strided(start, shape, strides)

    @classmethod
    def of(cls, values: np.ndarray, stride: int = 0) -> Fenced:
        """A copy of [rows, n] float32 or int32."""
        rows, n = values.shape
        made = cls(rows, n, stride, values.dtype)
        made.values[:] = values
        return made

    @classmethod
    def like(cls, values: np.ndarray) -> Fenced:
        """A copy of any contiguous array as one row, whole words of it."""
        return cls.of(np.ascontiguousarray(values).reshape(1, -1).view(np.int32))

    @property
    def address(self) -> int:
        return self.flat.ctypes.data + 4 * self.start

    def strays(self, live: int) -> int:
        """How many elements outside the first `live` rows are no longer the canary."""
        inside = np.zeros(self.flat.size, bool)
        for row in range(live):
            start = self.start + row * self.stride
            inside[start : start + self.n] = True
        outside = np.count_nonzero(self.flat[~inside] != CANARY)
        return int(outside + np.count_nonzero(self.beyond))


@contextmanager
def at_the_front() -> Iterator[None]:
    """Memory made in here begins behind a page that may not be touched."""
    Fenced.front = True
    try:
        yield
    finally:
        Fenced.front = False


def fenced_twice(call: Callable[[int], np.ndarray], threads: tuple[int, int] = (1, 3)) -> Any:
    """call(threads) with guards behind all memory, then again with guards before it.

    The result, after the bits of both were compared.
    """
    first = np.array(call(threads[0]))
    with at_the_front():
        again = np.array(call(threads[1]))
    assert first.tobytes() == again.tobytes(), "other bits from run to run"
    return first


def guarded_bytes(n: int, front: bool) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n] that ends, or in `front` begins, at a page that may not be touched.

    Also that page, all zeros, where no system call can protect it; else nothing.
    """
    page = mmap.PAGESIZE
    used = -(-n // page) * page
    whole = np.frombuffer(mmap.mmap(-1, used + page), np.uint8)
    start, guard = (page, 0) if front else (used - n, used)
    inside = whole[start : start + n]
    if sys.platform == "win32":
        return inside, whole[guard : guard + page]
    address = ctypes.c_void_p(whole.ctypes.data + guard)
    refused = ctypes.CDLL(None).mprotect(address, ctypes.c_size_t(page), 0)
    assert not refused, "mprotect refused the guard page"
    return inside, whole[:0]


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
    native = library(isa).get(kernel)
    table = np.array(native.ordered(kernel, words), np.int64)
    entry = function(native.address)
    for thread in range(threads) if only < 0 else [only]:
        entry(table.ctypes.data, thread, threads)


def _word(value: Any) -> int:
    if isinstance(value, Fenced):
        return value.address
    if isinstance(value, np.ndarray):
        return value.ctypes.data
    return float_bits(value) if isinstance(value, float) else int(value)
