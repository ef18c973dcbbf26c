"""Quantised weights times 1 to 8 columns of int8 activations: decode, where weights are read once.

As many lanes as a row has stretches share it (see `layouts.py`), a lane a stretch, two blocks at a
time; a warp has 32 / lanes rows at a time, ROWS times over. So neighbouring lanes read neighbouring
32 bytes, and rows of any length keep a warp busy. At the end the stretches' sums meet in shared
memory, where one lane each adds them in order.
"""

from __future__ import annotations

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    bits_to_f32,
    block_x,
    block_y,
    entry,
    f32,
    launch_next,
    launch_wait,
    load,
    load4,
    registers,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.plan.catalogue import constants

from .formats import FORMATS, adder
from .norm_tail import ARGUMENTS, norm_tail
from .sums import store_row_sums

WARPS = 4
THREADS = 32 * WARPS


@constants(format=tuple(FORMATS), columns=(1, 2, 4, 8))
def build_matvec(format: str, columns: int) -> Declared:
    """out[c, row] = sum over k of weights[row, k] x[c, k], + bias[row] + residual[c, row].

    `x`: packed columns, `n_columns` of them, of which 8 `block_y` .. are taken; `live`: how many
    mean something. Rows have `row_pieces` pieces and their parts begin at words `high`, `scales`,
    `supers`; 2^`shift` lanes, `stretches`, and `pairs` of blocks in each are those of their `cut`.
    `sums`: 1 with a bias, 2 with a residual, 3 with both. A single column may be normed at the
    end, see norm_tail.py. Grid (`blocks_of`, columns / 8).
    """
    form = FORMATS[format]
    ROWS, COLUMNS, WORDS, fetch = rows_of(format, columns), columns, form.words, form.fetch
    accumulators, places_of_rows = registers("f32", ROWS * COLUMNS), registers("u32", ROWS)
    words, bases = registers("u32", ROWS * WORDS), registers("u32", COLUMNS)
    add, finish = adder(format), store_row_sums(WARPS, ROWS, COLUMNS)
    tail = norm_tail(WARPS)

    @entry(
        "weights:u32* x:u32* bias:f32* residual:f32* out:f32* live:u32* n_rows:u32 n_columns:u32 "
        "row_pieces:u32 high:u32 scales:u32 supers:u32 shift:u32 stretches:u32 pairs:u32 "
        "out_stride:u32 residual_stride:u32 sums:u32 " + ARGUMENTS,
        threads=THREADS,
    )
    def matvec(
        weights, x, bias, residual, out, live, n_rows, n_columns, row_pieces, high, scales, supers,
        shift, stretches, pairs, out_stride, residual_stride, sums, norm_x, norm_w, normed,
        norm_packed, tickets, norm_n, norm_eps, norm_stretches, norm_length, norm_to,
    ):  # fmt: skip
        launch_next()
        acc, row, raw, base = accumulators(), places_of_rows(), words(), bases()
        lane, slots = u32(thread_x() & 31), u32(u32(32) >> shift)
        stretch = u32(lane & u32((u32(1) << shift) - 1))
        first = u32(u32(block_x() * WARPS + (thread_x() >> 5)) * u32(ROWS * slots))
        mine = u32(first + (lane >> shift))
        for r in range(ROWS):
            row[r] = u32(min(u32(mine + r * slots), u32(n_rows - 1)) * row_pieces)
        for n in range(ROWS * COLUMNS):
            acc[n] = f32(0)
        places, column = u32(2 * stretches * pairs), u32(8 * block_y())
        for c in range(COLUMNS):
            base[c] = u32(min(u32(column + c), u32(n_columns - 1)) * u32((places >> 1) * 5))
        pair, block = stretch, u32(2 * pairs * stretch)
        end = u32(stretches * pairs) if stretch < stretches else u32(0)
        launch_wait()
        if column >= load(live, 0):
            return
        while pair < end:
            for r in range(ROWS):
                fetch(raw, r * WORDS, weights, row[r], high, scales, supers, places, pair, block)
            for c in range(COLUMNS):
                p = u32(base[c] + 2 * pair)
                a, b = load4(x, p), load4(x, u32(p + 1))
                v, w = load4(x, u32(p + places)), load4(x, u32(p + places + 1))
                m = load4(x, u32(base[c] + 2 * places + pair))
                xs, ys = bits_to_f32(m[0]), bits_to_f32(m[2])
                for r in range(ROWS):
                    n = r * COLUMNS + c
                    acc[n] = add(raw, r * WORDS, 0, a, v, xs, m[1], acc[n])
                    acc[n] = add(raw, r * WORDS, 1, b, w, ys, m[3], acc[n])
            pair, block = u32(pair + stretches), u32(block + 2)
        finish(
            acc, out, bias, residual, first, n_rows, column, n_columns, out_stride,
            residual_stride, sums, shift,
        )  # fmt: skip
        if COLUMNS == 1:
            tail(
                norm_x, norm_w, normed, norm_packed, tickets, norm_n, norm_eps,
                norm_stretches, norm_length, norm_to,
            )  # fmt: skip

    return matvec


def rows_of(format: str, columns: int) -> int:
    """Rows that a lane takes part in."""
    return 2 if columns > 1 or FORMATS[format].words > 12 else 4


def blocks_of(format: str, columns: int, rows: int, lanes: int) -> int:
    """Blocks of threads that take `rows` rows of `lanes` lanes each."""
    return -(-rows // (WARPS * rows_of(format, columns) * (32 // lanes)))
