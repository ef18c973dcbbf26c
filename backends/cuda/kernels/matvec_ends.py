"""How matrix-vector kernels begin and end: which of several weights a block of threads multiplies
with, and what becomes of its sums.

Weights of one launch share x, length and format; each has blocks of its own. Or two of them are
gate and up: then lanes have rows of both in turn, and silu(gate) * up (or its clamped form) is what
the launch gives, as float32 or packed for the next product.
"""

from __future__ import annotations

from collections.abc import Callable

from runtime.backends.cuda.intrinsics import (
    ahead,
    f32,
    fmax,
    fmin,
    load,
    pick,
    shared,
    shared_load4,
    store,
    syncthreads,
    syncwarp,
    thread_x,
    u32,
)  # fmt: skip

from .elementwise import sigmoid
from .pack import pack_values
from .sums import STRIDE, stretch_sum

WARPS = 4
THREADS = 32 * WARPS
AHEAD = 4  # times 4096 bytes of a warp's rows
MOST = 4  # weights of a launch
RESIDUAL = 1 << MOST  # in `sums`, after a bit for the bias of each weight
GATED, PACKED = 1, 2  # in `gate`

POINTERS = (
    "w0:u32* w1:u32* w2:u32* w3:u32* b0:f32* b1:f32* b2:f32* b3:f32* out0:f32* out1:f32* "
    "out2:f32* out3:f32* residual:f32* live:u32*"
)
NUMBERS = (
    "n0:u32 n1:u32 n2:u32 n3:u32 first1:u32 first2:u32 first3:u32 n_columns:u32 "
    "residual_stride:u32 sums:u32 gate:u32 turns:u32 alpha:f32 limit:f32 plus:f32 shift:u32 "
    "row_pieces:u32"
)


def number_of(which, a, b, c, d):
    """One of four numbers."""
    found = a
    if which == 1:
        found = b
    if which == 2:
        found = c
    if which == 3:
        found = d
    return found


def weight_of(block, first1, first2, first3):
    """Which weight a block of threads is for: the others' begin at these blocks."""
    which = u32(0)
    if block >= first1:
        which = u32(1)
    if block >= first2:
        which = u32(2)
    if block >= first3:
        which = u32(3)
    return which


def finisher(rows: int, columns: int) -> tuple[Callable, Callable]:
    """Device functions of a kernel whose lanes have `rows` x `columns` sums, used once.

    finish: adds the stretches' sums of a warp's rows in order, joins gate and up where they are,
    and puts biases and a residual on top; results go to memory, or where the second, pack, finds
    them when all turns are done.
    """
    count, most = rows * columns, WARPS * 32 * rows // 2
    partial, values = shared("f32", WARPS * count * STRIDE), shared("f32", columns * most)

    def finish(
        acc, out, bias, up_bias, residual, first, start, n_rows, column, n_columns,
        residual_stride, terms, gate, alpha, limit, plus, shift,
    ):  # fmt: skip
        sums, kept = partial(), values()
        base = u32((thread_x() >> 5) * (count * STRIDE))
        for n in range(count):
            sums[u32(base + n * STRIDE + (thread_x() & 31))] = acc[n]
        syncwarp()
        both, slots, job = u32(gate & GATED), u32(32 >> shift), u32(thread_x() & 31)
        while job < (count >> both) * slots:
            n, slot = u32(job >> (5 - shift)), u32(job & (slots - 1))
            pair, c = u32(n // columns), u32(n % columns)
            row, value, up, side = u32(first + pair * slots + slot), f32(0), f32(0), u32(0)
            if row < n_rows:
                while side <= both:
                    at = (pair * (both + 1) + side) * columns + c
                    found = stretch_sum(sums, u32(base + at * STRIDE + (slot << shift)), shift)
                    if (terms >> side) & 1:
                        added = pick(side, bias, up_bias, bias, up_bias)
                        found += load(added, row)
                    if side == 0:
                        value = found
                    else:
                        up = found
                    side = u32(side + 1)
                if both:
                    value = joined(value, up, alpha, limit, plus)
                if column + c < n_columns:
                    if terms & RESIDUAL:
                        value += load(residual, u32((column + c) * residual_stride + row))
                    if gate & PACKED == 0:
                        store(out, u32((column + c) * n_rows + row), value)
            if gate & PACKED:
                kept[u32(c * most + row - start)] = value
            job = u32(job + 32)
        syncwarp()

    def pack(packed, start, rows_here, column, n_columns, stretches, length):
        kept, item, end = values(), u32(thread_x() >> 3), u32((rows_here >> 5) * columns)
        syncthreads()
        while (item & 0xFFFFFFFC) < end:
            own = min(item, u32(end - 1))
            block, c = u32(own // columns), u32(own % columns)
            at = u32(32 * block + 4 * (thread_x() & 7))
            v = shared_load4(kept, u32((c * most + at) >> 2))
            live = item < end and column + c < n_columns
            live = live and (start >> 5) + block < stretches * length
            i = u32((start + at) >> 2)
            pack_values(v, packed, u32(column + c), i, stretches, length, live)
            item = u32(item + WARPS * 4)

    return finish, pack


def joined(gate, up, alpha, limit, plus):
    """silu(gate) * up with alpha 1, no limit and plus 0; the clamped form with other numbers."""
    gate = fmin(gate, limit)
    up = fmax(fmin(up, limit), -limit)
    return (up + plus) * (gate * sigmoid(alpha * gate))


def rows_ahead(weights, first, end, row_pieces):
    """Bring the beginning of a warp's rows near while the launch before this one still runs."""
    at, last = u32(first * row_pieces + 8 * (thread_x() & 31)), u32(end * row_pieces)
    for _ in range(AHEAD):
        if at < last:
            ahead(weights, u32(4 * at))
        at = u32(at + 256)


def turns_of(rows: int, lanes: int) -> int:
    """How often a block of threads must take rows of gate and up to have a multiple of 32."""
    return max(1, 32 // (WARPS * (32 // lanes) * rows // 2))


def rows_of_block(rows: int, lanes: int, gate: bool) -> int:
    """Rows that a block of threads takes, where lanes have `rows` each."""
    each = WARPS * (32 // lanes) * rows
    return each // 2 * turns_of(rows, lanes) if gate else each
