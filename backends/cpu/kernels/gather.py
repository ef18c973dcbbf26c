"""Rows picked by number: activation rows. Parallel over (row x 16 elements).

Rows of weights are picked and decoded by `backends/cpu/tile/get_rows.py`.
"""

from __future__ import annotations

from . import simd as s
from .rows import share


def build_gather_rows():
    """out[i] = x[ids[i]]: float32 rows picked by int32 ids."""

    def gather_rows(x, ids, out, live, n, x_stride, out_stride, thread, n_threads):
        whole = n // 16
        units = (n + 15) // 16
        first, last = share(s.load_i64(live) * units, thread, n_threads)
        for item in range(first, last):
            row, unit = item // units, item % units
            source = x + (s.load_i32(ids + row * 4) * x_stride + unit * 16) * 4
            target = out + (row * out_stride + unit * 16) * 4
            if unit < whole:
                s.store(target, s.load(source))
            else:
                part = n - whole * 16
                s.store_part(target, s.load_part(source, part, s.f32(0)), part)

    return gather_rows
