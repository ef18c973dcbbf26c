"""Rows of float32 copied and picked: a thread an element, a block of threads along a row."""

from __future__ import annotations

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    block_y,
    entry,
    launch_next,
    launch_wait,
    load,
    store,
    thread_x,
    u32,
)  # fmt: skip

THREADS = 256


def build_copy_rows() -> Declared:
    """out f32 [rows, n] = x of row stride `x_stride`. Grid (n / 256 rounded up, rows)."""

    @entry("x:f32* out:f32* n:u32 x_stride:u32", threads=THREADS)
    def copy_rows(x, out, n, x_stride):
        launch_next()
        i, row = u32(block_x() * THREADS + thread_x()), block_y()
        launch_wait()
        if i < n:
            store(out, u32(row * n + i), load(x, u32(row * x_stride + i)))

    return copy_rows


def build_gather_rows() -> Declared:
    """out[row] = x[ids[row]]: f32 rows of n, those of x `x_stride` apart. Grid as `copy_rows`."""

    @entry("x:f32* ids:i32* out:f32* n:u32 x_stride:u32", threads=THREADS)
    def gather_rows(x, ids, out, n, x_stride):
        launch_next()
        i, row = u32(block_x() * THREADS + thread_x()), block_y()
        launch_wait()
        if i < n:
            source = u32(load(ids, row))
            store(out, u32(row * n + i), load(x, u32(source * x_stride + i)))

    return gather_rows
