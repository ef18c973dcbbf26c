"""What several teams of threads do together: parallel over the units of all rows, of each team.

A plan meets the other teams (`meet`) before it reads what they wrote, and once more before it
writes what they may still read.
"""

from __future__ import annotations

from . import simd as s
from .elementwise import get, put
from .rows import helper, piece, share


@helper
def at(parts, k, row, stride):
    """The address of a row of part k; `stride` in floats."""
    return s.load_i64(parts + k * 8) + row * stride * 4


def build_sum_parts():
    """The sum of a row over the teams' parts: parallel over (row x 16 elements), in each team."""

    def sum_parts(parts, n_parts, out, live, n, x_stride, out_stride, thread, n_threads):
        """out = part 0 + part 1 + .., in this order on every team; parts: their addresses."""
        units = (n + 15) // 16
        item, last = share(s.load_i64(live) * units, thread, n_threads)
        while item < last:
            row, first, stop = piece(item, last, units)
            for unit in range(first, stop):
                i = unit * 16
                total = get(at(parts, 0, row, x_stride), i, n, 0)
                for k in range(1, n_parts):
                    total = total + get(at(parts, k, row, x_stride), i, n, 0)
                put(out + row * out_stride * 4, i, n, total)
            item += stop - first

    return sum_parts
