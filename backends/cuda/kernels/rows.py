"""Rows of float32 copied and picked: a thread an element, a block of threads along a row."""

from __future__ import annotations

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    block_y,
    entry,
    f32,
    launch_next,
    launch_wait,
    load,
    store,
    thread_x,
    u32,
)  # fmt: skip

THREADS = 256


def build_copy_rows() -> Declared:
    """out f32 [rows, width] = x, rows of n `stride` apart, filled up with zeros.

    Grid (width / 256 rounded up, rows).
    """

    @entry("x:f32* out:f32* n:u32 stride:u32 width:u32", threads=THREADS)
    def copy_rows(x, out, n, stride, width):
        launch_next()
        i, row = u32(block_x() * THREADS + thread_x()), block_y()
        launch_wait()
        if i < width:
            value = f32(0)
            if i < n:
                value = load(x, u32(row * stride + i))
            store(out, u32(row * width + i), value)

    return copy_rows


def build_gather_rows() -> Declared:
    """out[row] = x[ids[row]]: f32 rows of n, those of x `x_stride` apart. Grid (n / 256, rows)."""

    @entry("x:f32* ids:i32* out:f32* n:u32 x_stride:u32", threads=THREADS)
    def gather_rows(x, ids, out, n, x_stride):
        launch_next()
        i, row = u32(block_x() * THREADS + thread_x()), block_y()
        launch_wait()
        if i < n:
            source = u32(load(ids, row))
            store(out, u32(row * n + i), load(x, u32(source * x_stride + i)))

    return gather_rows
