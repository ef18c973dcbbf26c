"""Rows picked by number: activation rows. Parallel over (row x 16 elements).

Rows of weights are picked and decoded by `backends/cpu/tile/get_rows.py`.
"""

from __future__ import annotations

from . import simd as s
from .elementwise import get, put
from .rows import share


def build_gather_rows():
    """out[i] = x[ids[i]]: float32 rows picked by int32 ids."""

    def gather_rows(x, ids, out, live, n, x_stride, out_stride, thread, n_threads):
        units = (n + 15) // 16
        first, last = share(s.load_i64(live) * units, thread, n_threads)
        for item in range(first, last):
            row, i = item // units, item % units * 16
            source = x + s.load_i32(ids + row * 4) * x_stride * 4
            put(out + row * out_stride * 4, i, n, get(source, i, n, 0))

    return gather_rows
