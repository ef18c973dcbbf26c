"""An RMS norm at the end of the launch that makes its row: the last block to be done norms it.

For one row, so a step of one token: there a launch costs more than the norm. The bits are those of
the norm alone (`norm.py`): its threads are played by those of the block, in turns.
"""

from __future__ import annotations

from collections.abc import Callable

from runtime.backends.cuda.intrinsics import (
    constant4,
    divide,
    f32,
    grid_x,
    load4,
    rsqrt,
    shared,
    store4,
    syncthreads,
    thread_x,
    u32,
)  # fmt: skip

from .norm import WARPS, scaled, squares
from .pack import pack_values
from .sums import last_block, warp_sum

# norm_x: the row once more, as it is read. norm_to: 1 for float32 in `normed`, 2 for packed int8 in
# `norm_packed`, 3 for both, 0 where there is no norm.
ARGUMENTS = (
    "norm_x:f32* norm_w:f32* normed:f32* norm_packed:u32* tickets:u32* norm_n:u32 "
    "norm_eps:f32 norm_stretches:u32 norm_length:u32 norm_to:u32"
)
NAMES = tuple(argument.split(":")[0] for argument in ARGUMENTS.split())
FLOATS, PACKED = 1, 2


def norm_tail(warps: int) -> Callable:
    """What every thread of a block of `warps` calls at its end, with ARGUMENTS; used once.

    `warps` divides WARPS.
    """
    threads, turns = 32 * warps, WARPS // warps
    last, partial = last_block(), shared("f32", WARPS)

    def row_sum(x, pieces):
        """Sum of squares of the row as WARPS warps add it, in every thread."""
        sums = partial()
        for turn in range(turns):
            i, square = u32(turn * threads + thread_x()), f32(0)
            warp = u32(i >> 5)
            while i < pieces:
                square = squares(load4(x, i), square)
                i = u32(i + 32 * WARPS)
            square = warp_sum(square)
            if thread_x() & 31 == 0:
                sums[warp] = square
        syncthreads()
        total = f32(0)
        for w in range(WARPS):
            total += sums[w]
        return total

    def tail(
        norm_x, norm_w, normed, norm_packed, tickets, norm_n, norm_eps,
        norm_stretches, norm_length, norm_to,
    ):  # fmt: skip
        if norm_to == 0:
            return
        if not last(tickets, u32(0), grid_x()):
            return
        pieces = u32(norm_n >> 2)
        r = rsqrt(divide(row_sum(norm_x, pieces), f32(norm_n)) + norm_eps)
        first, end = u32(0), pieces
        if norm_to & PACKED:
            end = u32(8 * u32(norm_stretches * norm_length))
        while first < end:
            i = u32(first + thread_x())
            at = min(i, u32(pieces - 1))
            v = scaled(load4(norm_x, at), constant4(norm_w, at), r)
            if norm_to & FLOATS and i < pieces:
                store4(normed, i, v[0], v[1], v[2], v[3])
            if norm_to & PACKED:
                if i >= pieces:
                    v = f32(0), f32(0), f32(0), f32(0)
                pack_values(v, norm_packed, u32(0), i, norm_stretches, norm_length, i < end)
            first = u32(first + threads)

    return tail
