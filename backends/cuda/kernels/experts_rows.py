"""A warp's rows of matrices of experts, and products with float32 weights, choice by choice.

Rows are shared by the lanes of a warp as in `matvec.py`, and their sums are the canonical ones of
`layouts.py`. A block of 8 warps takes one choice, which is a column of its own.
"""

from __future__ import annotations

from collections.abc import Callable

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
    load_pair,
    registers,
    shared,
    store,
    syncwarp,
    thread_x,
    u32,
)  # fmt: skip

from .formats import FORMATS, adder
from .matvec import rows_of
from .matvec_float import add_unit, fetch
from .sums import STRIDE, stretch_sum

WARPS = 8
THREADS = 32 * WARPS
MOST_ROWS = 128  # of a warp at a time
FLOAT_ROWS = 4  # that a lane takes part in
SECOND = 32  # between sums of two matrices


def warp_rows(format: str, matrices: int = 1) -> Callable:
    """A function that puts the sums of a warp's next rows of a matrix, `limit` at most, to `y`.

    x: the column begins at piece `column`; the rows begin at row `row`; the rest as in `matvec`.
    Of two matrices each lane has half its rows of `weights` and half of `others`, whose sums go
    `SECOND` further on.
    """
    form = FORMATS[format]
    ROWS, WORDS, fetch, add = rows_of(format, 1), form.words, form.fetch, adder(format)
    EACH, keep = ROWS // matrices, _keeper(ROWS, matrices)
    accumulators, words, places_of_rows = (
        registers("f32", ROWS), registers("u32", ROWS * WORDS), registers("u32", EACH)
    )  # fmt: skip

    def sums(
        y, at, weights, others, x, column, row, limit, row_pieces, high, scales, supers, shift,
        stretches, pairs,
    ):  # fmt: skip
        acc, raw, base = accumulators(), words(), places_of_rows()
        lane, slots = u32(thread_x() & 31), u32(u32(32) >> shift)
        stretch = u32(lane & u32((u32(1) << shift) - 1))
        for r in range(EACH):
            own = u32(min(u32(u32(lane >> shift) + r * slots), u32(limit - 1)))
            base[r] = u32(u32(row + own) * row_pieces)
        for r in range(ROWS):
            acc[r] = f32(0)
        places = u32(2 * stretches * pairs)
        pair, block = stretch, u32(2 * pairs * stretch)
        end = u32(stretches * pairs) if stretch < stretches else u32(0)
        while pair < end:
            for r in range(ROWS):
                w, to = weights if r < EACH else others, r * WORDS
                fetch(raw, to, w, base[r % EACH], high, scales, supers, places, pair, block)
            p = u32(column + 2 * pair)
            firsts, seconds = load_pair(x, p), load_pair(x, u32(p + places))
            a, b, c, d = firsts[:4], firsts[4:], seconds[:4], seconds[4:]
            m = load4(x, u32(column + 2 * places + pair))
            for r in range(ROWS):
                acc[r] = add(raw, r * WORDS, 0, a, c, bits_to_f32(m[0]), m[1], acc[r])
                acc[r] = add(raw, r * WORDS, 1, b, d, bits_to_f32(m[2]), m[3], acc[r])
            pair, block = u32(pair + stretches), u32(block + 2)
        keep(y, at, acc, limit, shift)

    return sums


def warp_rows_of_floats() -> Callable:
    """The same for float32 weights and columns, as in `matvec_float`."""
    ROWS, keep = FLOAT_ROWS, _keeper(FLOAT_ROWS)
    accumulators, values = registers("f32", ROWS), registers("f32", 8)

    def sums(y, at, weights, x, column, row, limit, row_pieces, shift, units):
        acc, own = accumulators(), values()
        lane, slots, lanes = u32(thread_x() & 31), u32(u32(32) >> shift), u32(u32(1) << shift)
        for r in range(ROWS):
            acc[r] = f32(0)
        unit = u32(lane & u32(lanes - 1))
        while unit < units:
            for r in range(ROWS):
                mine = u32(min(u32(u32(lane >> shift) + r * slots), u32(limit - 1)))
                fetch(own, 0, weights, u32(u32(row + mine) * row_pieces), unit)
                acc[r] = add_unit(own, 0, x, u32(column + 2 * unit), acc[r])
            unit = u32(unit + lanes)
        keep(y, at, acc, limit, shift)

    return sums


def _keeper(ROWS: int, matrices: int = 1) -> Callable:
    """The end of both: a lane adds the sums of a row's stretches in order, and puts the row's."""
    partial, EACH = shared("f32", WARPS * ROWS * STRIDE), ROWS // matrices

    def keep(y, at, acc, limit, shift):
        kept, lane, slots = partial(), u32(thread_x() & 31), u32(u32(32) >> shift)
        mine = u32((thread_x() >> 5) * (ROWS * STRIDE))
        for r in range(ROWS):
            kept[u32(mine + r * STRIDE + lane)] = acc[r]
        syncwarp()
        job = lane
        while job < u32(ROWS * slots):
            n, slot = u32(job >> (5 - shift)), u32(job & u32(slots - 1))
            row = u32(u32(u32(n % EACH) * slots) + slot)
            if row < limit:
                first = u32(u32(mine + n * STRIDE) + u32(slot << shift))
                to = u32(u32(at + row) + u32(n // EACH) * SECOND)
                y[to] = stretch_sum(kept, first, shift)
            job = u32(job + 32)
        syncwarp()

    return keep


def build_expert_rows_float() -> Declared:
    """out[choice] = w x + bias, of float32 weights and columns: `units` of 8 values.

    `rows` rows of each expert, one expert after another; biases alike. `x`: columns, each of
    `every` choices; ids i32 [live], below 0 where an expert is elsewhere: then nothing is written.
    Grid (rows / (8 times the rows of a warp at a time), choices).
    """
    sums = warp_rows_of_floats()
    values = shared("f32", WARPS * MOST_ROWS)

    @entry(
        "weights:u32* x:f32* ids:i32* bias:f32* out:f32* live:u32* rows:u32 every:u32 "
        "row_pieces:u32 shift:u32 units:u32 has_bias:u32",
        threads=THREADS,
    )
    def expert_rows_float(
        weights, x, ids, bias, out, live, rows, every, row_pieces, shift, units, has_bias
    ):  # fmt: skip
        launch_next()
        y, choice, warp = values(), u32(block_y()), u32(thread_x() >> 5)
        step = u32(u32(u32(32) >> shift) * FLOAT_ROWS)
        first = u32(u32(block_x() * WARPS + warp) * step)
        launch_wait()
        if choice >= load(live, 0):
            return
        expert = load(ids, choice)
        if expert >= 0 and first < rows:
            left = u32(min(u32(rows - first), step))
            column = u32(u32(choice // every) * u32(2 * units))
            row = u32(u32(u32(expert) * rows) + first)
            sums(
                y, u32(warp * MOST_ROWS), weights, x, column, row, left, row_pieces, shift, units
            )  # fmt: skip
            i = u32(thread_x() & 31)
            while i < left:
                value = y[u32(u32(warp * MOST_ROWS) + i)]
                if has_bias:
                    value += load(bias, u32(row + i))
                store(out, u32(u32(u32(choice * rows) + first) + i), value)
                i = u32(i + 32)

    return expert_rows_float


def rows_at_once(format: str, lanes: int) -> int:
    """Rows of a warp at a time."""
    return (rows_of(format, 1) if format in FORMATS else FLOAT_ROWS) * (32 // lanes)
