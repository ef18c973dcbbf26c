"""Float32 weights times one column of float32: a warp per row."""

from __future__ import annotations

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    block_y,
    constant,
    entry,
    f32,
    fma,
    launch_next,
    launch_wait,
    load,
    store,
    thread_x,
    u32,
)  # fmt: skip

from .sums import warp_sum

ROWS = 4  # of a block: a warp each


def build_matvec_f32() -> Declared:
    """out[c, row] = sum over k of weights[row, k] x[c, k]. Grid (rows / 4, columns)."""

    @entry("weights:f32* x:f32* out:f32* n_rows:u32 n_inner:u32", threads=32 * ROWS)
    def matvec_f32(weights, x, out, n_rows, n_inner):
        launch_next()
        row = u32(block_x() * ROWS + (thread_x() >> 5))
        at = u32(min(row, u32(n_rows - 1)) * n_inner)
        column, total = u32(block_y() * n_inner), f32(0)
        launch_wait()
        k = u32(thread_x() & 31)
        while k < n_inner:
            total = fma(constant(weights, u32(at + k)), load(x, u32(column + k)), total)
            k = u32(k + 32)
        total = warp_sum(total)
        if (thread_x() & 31) == 0 and row < n_rows:
            store(out, u32(block_y() * n_rows + row), total)

    return matvec_f32
