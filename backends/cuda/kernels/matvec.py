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
    load_pair,
    pick,
    registers,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.cuda.widths import columns_of
from runtime.backends.plan.catalogue import constants

from .formats import FORMATS, adder
from .matvec_ends import (
    GATED,
    NUMBERS,
    PACKED,
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


def _made(format: str, columns: int) -> bool:
    return columns_of(columns, format) == columns


def _pair_at_one_address(x, p):
    """Units p and p + 1 of four."""
    both = load_pair(x, p)
    return both[:4], both[4:]


def _pair(x, p):
    """The same at addresses of their own: of several columns these take fewer registers."""
    return load4(x, p), load4(x, u32(p + 1))


@constants(format=tuple(FORMATS), columns=(1, 2, 4, 8), where=_made)
def build_matvec(format: str, columns: int) -> Declared:
    """out[c, row] = sum over k of w[row, k] x[c, k], + b[row] + residual[c, row], of each weight.

    Weight i has `n<i>` rows and blocks of threads from `first<i>` on. `x`: packed columns,
    `n_columns` of them, of which 8 `block_y` .. are taken; `live`: how many mean something. Rows
    have `row_pieces` pieces and their parts begin at words `high`, `scales`, `supers`; 2^`shift`
    lanes, `stretches`, and `pairs` of blocks in each are those of their `cut`. `sums`: bit i for a
    bias of weight i, then one for a residual. `gate`: weights 0 and 1 are gate and up, in `turns`
    rounds; where it says so the result is packed, by the cut of n0 values. A single column may be
    normed at the end, see norm_tail.py. Grid (blocks of all weights, columns / 8), see
    `rows_of_block`.
    """
    form, ROWS, COLUMNS = FORMATS[format], rows_of(format, columns), columns
    WORDS, fetch, add = form.words, form.fetch, adder(format)
    accumulators, places_of_rows = registers("f32", ROWS * COLUMNS), registers("u32", ROWS)
    words, bases = registers("u32", ROWS * WORDS), registers("u32", COLUMNS)
    (finish, pack), tail = finisher(ROWS, COLUMNS), norm_tail(WARPS)
    pair_of = _pair_at_one_address if columns == 1 else _pair

    @entry(
        f"{POINTERS} x:u32* packed:u32* {NUMBERS} high:u32 scales:u32 supers:u32 stretches:u32 "
        "pairs:u32 out_stretches:u32 out_length:u32 " + ARGUMENTS,
        threads=THREADS, min_blocks=3 if columns == 8 else 4,
    )  # fmt: skip
    def matvec(
        w0, w1, w2, w3, b0, b1, b2, b3, out0, out1, out2, out3, residual, live, x, packed, n0, n1,
        n2, n3, first1, first2, first3, n_columns, residual_stride, sums, gate, turns, alpha, limit,
        plus, shift, row_pieces, high, scales, supers, stretches, pairs, out_stretches, out_length,
        norm_x, norm_w, normed, norm_packed, tickets, norm_n, norm_eps, norm_stretches,
        norm_length, norm_to,
    ):  # fmt: skip
        launch_next()
        acc, row, raw, base = accumulators(), places_of_rows(), words(), bases()
        which = weight_of(block_x(), first1, first2, first3)
        n_rows, both = number_of(which, n0, n1, n2, n3), u32(gate & GATED)
        even, odd = pick(which, w0, w1, w2, w3), pick(u32(which + both), w0, w1, w2, w3)
        out, bias = pick(which, out0, out1, out2, out3), pick(which, b0, b1, b2, b3)
        lane, slots = u32(thread_x() & 31), u32(32 >> shift)
        stretch, step = u32(lane & ((1 << shift) - 1)), u32((ROWS >> both) * slots)
        own = u32(block_x() - number_of(which, u32(0), first1, first2, first3))
        start, turn = u32(own * turns * WARPS * step), u32(0)
        places, column = u32(2 * stretches * pairs), u32(8 * block_y())
        for c in range(COLUMNS):
            base[c] = u32(min(u32(column + c), u32(n_columns - 1)) * (places >> 1) * 5)
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
            pair, block = stretch, u32(2 * pairs * stretch)
            end = u32(stretches * pairs) if stretch < stretches and first < n_rows else u32(0)
            while pair < end:
                for r in range(ROWS):
                    weights = pick(r & 1, even, odd, even, odd)
                    fetch(
                        raw, r * WORDS, weights, row[r], high, scales, supers, places, pair, block
                    )
                for c in range(COLUMNS):
                    p = u32(base[c] + 2 * pair)
                    a, b = pair_of(x, p)
                    v, w = pair_of(x, u32(p + places))
                    m = load4(x, u32(base[c] + 2 * places + pair))
                    xs, ys = bits_to_f32(m[0]), bits_to_f32(m[2])
                    for r in range(ROWS):
                        n = r * COLUMNS + c
                        acc[n] = add(raw, r * WORDS, 0, a, v, xs, m[1], acc[n])
                        acc[n] = add(raw, r * WORDS, 1, b, w, ys, m[3], acc[n])
                pair, block = u32(pair + stretches), u32(block + 2)
            finish(
                acc, out, bias, b1, residual, first, start, n_rows, column, n_columns,
                residual_stride, u32((sums >> which) & 3 | sums & RESIDUAL), gate, alpha, limit,
                plus, shift,
            )  # fmt: skip
            turn = u32(turn + 1)
        if gate & PACKED:
            here = u32(turns * WARPS * step)
            pack(packed, start, here, column, n_columns, out_stretches, out_length)
        if COLUMNS == 1:
            tail(
                norm_x, norm_w, normed, norm_packed, tickets, norm_n, norm_eps,
                norm_stretches, norm_length, norm_to,
            )  # fmt: skip

    return matvec


def rows_of(format: str, columns: int) -> int:
    """Rows that a lane takes part in."""
    return 2 if columns > 1 or FORMATS[format].words > 12 else 4
