"""Float32 weights times 1 to 8 columns of float32, 8 values of a row at a time; lanes share rows as
in `matvec.py`."""

from __future__ import annotations

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    bits_to_f32,
    block_x,
    block_y,
    constant4,
    entry,
    f32,
    fma,
    launch_next,
    launch_wait,
    load,
    load4,
    pick,
    registers,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.plan.catalogue import constants

from .matvec_ends import (
    GATED,
    NUMBERS,
    POINTERS,
    RESIDUAL,
    THREADS,
    WARPS,
    finisher,
    number_of,
    rows_ahead,
    weight_of,
)
from .norm_tail import ARGUMENTS, norm_tail


def fetch(values, at, weights, row, unit):
    """8 values of a row that begins at piece `row`."""
    p = u32(row + 2 * unit)
    a, b = constant4(weights, p), constant4(weights, u32(p + 1))
    for i in range(4):
        values[at + i], values[at + 4 + i] = bits_to_f32(a[i]), bits_to_f32(b[i])


def add_unit(values, at, x, p, total):
    """total + 8 products in order: `values` with pieces p and p + 1 of `x`."""
    a, b = load4(x, p), load4(x, u32(p + 1))
    for i in range(4):
        total = fma(values[at + i], a[i], total)
    for i in range(4):
        total = fma(values[at + 4 + i], b[i], total)
    return total


@constants(columns=(1, 2, 4, 8))
def build_matvec_float(columns: int) -> Declared:
    """As `matvec`: rows have `row_pieces` pieces and `units` of 8 values; columns `units` too."""
    ROWS, COLUMNS = rows_of(columns), columns
    accumulators, places_of_rows = registers("f32", ROWS * COLUMNS), registers("u32", ROWS)
    weight_values, bases = registers("f32", ROWS * 8), registers("u32", COLUMNS)
    (finish, _), tail = finisher(ROWS, COLUMNS), norm_tail(WARPS)

    @entry(f"{POINTERS} x:f32* {NUMBERS} units:u32 {ARGUMENTS}", threads=THREADS)
    def matvec_float(
        w0, w1, w2, w3, b0, b1, b2, b3, out0, out1, out2, out3, residual, live, x, n0, n1, n2, n3,
        first1, first2, first3, n_columns, residual_stride, sums, gate, turns, alpha, limit, plus,
        shift, row_pieces, units, norm_x, norm_w, normed, norm_packed, tickets, norm_n,
        norm_eps, norm_stretches, norm_length, norm_to,
    ):  # fmt: skip
        launch_next()
        acc, row, values, base = accumulators(), places_of_rows(), weight_values(), bases()
        which = weight_of(block_x(), first1, first2, first3)
        n_rows, both = number_of(which, n0, n1, n2, n3), u32(gate & GATED)
        even, odd = pick(which, w0, w1, w2, w3), pick(u32(which + both), w0, w1, w2, w3)
        out, bias = pick(which, out0, out1, out2, out3), pick(which, b0, b1, b2, b3)
        lane, slots, lanes = u32(thread_x() & 31), u32(32 >> shift), u32(1 << shift)
        own = u32(block_x() - number_of(which, u32(0), first1, first2, first3))
        step, turn = u32((ROWS >> both) * slots), u32(0)
        start, column = u32(own * turns * WARPS * step), u32(8 * block_y())
        for c in range(COLUMNS):
            base[c] = u32(min(u32(column + c), u32(n_columns - 1)) * 2 * units)
        first = u32(start + (thread_x() >> 5) * step)
        behind = min(u32(first + step), n_rows)
        rows_ahead(even, first, behind, row_pieces)
        if both:
            rows_ahead(odd, first, behind, row_pieces)
        launch_wait()
        if column >= load(live, 0):
            return
        while turn < turns:
            first = u32(start + (turn * WARPS + (thread_x() >> 5)) * step)
            for r in range(ROWS):
                mine = u32(first + (r >> both) * slots + (lane >> shift))
                row[r] = u32(min(mine, u32(n_rows - 1)) * row_pieces)
                for c in range(COLUMNS):
                    acc[r * COLUMNS + c] = f32(0)
            unit = u32(lane & (lanes - 1))
            while unit < units:
                for r in range(ROWS):
                    weights = pick(r & 1, even, odd, even, odd)
                    fetch(values, r * 8, weights, row[r], unit)
                for c in range(COLUMNS):
                    for r in range(ROWS):
                        n = r * COLUMNS + c
                        acc[n] = add_unit(values, r * 8, x, u32(base[c] + 2 * unit), acc[n])
                unit = u32(unit + lanes)
            finish(
                acc, out, bias, b1, residual, first, start, n_rows, column, n_columns,
                residual_stride, u32((sums >> which) & 3 | sums & RESIDUAL), gate, alpha, limit,
                plus, shift,
            )  # fmt: skip
            turn = u32(turn + 1)
        if COLUMNS == 1:
            tail(
                norm_x, norm_w, normed, norm_packed, tickets, norm_n, norm_eps,
                norm_stretches, norm_length, norm_to,
            )  # fmt: skip

    return matvec_float


def rows_of(columns: int) -> int:
    """Rows that a lane takes part in."""
    return 4 if columns == 1 else 2
