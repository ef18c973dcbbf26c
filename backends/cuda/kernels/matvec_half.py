"""Weights in f16 or bf16 times 1 to 8 columns of float32 on tensor cores: decode.

16 rows, or as many of gate and of up, are what warps compute together: 2^`shift` of them take
blocks of k in turn, each its products of 16 rows and 8 columns, which meet in shared memory. There
a thread adds those of a row and column in the order of k, while the next are read.
"""

from __future__ import annotations

from collections.abc import Callable

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    ahead,
    block_x,
    block_y,
    constant4,
    entry,
    f32,
    fma,
    fmax,
    launch_next,
    launch_wait,
    load,
    pick,
    registers,
    shared,
    shared_store4,
    shuffle_xor,
    store,
    syncthreads,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.plan.catalogue import constants

from .halves import HALVES, UNITS, factor_of, peak_of, read_unit, scale_of, splitter
from .matvec_ends import NUMBERS, POINTERS, RESIDUAL, joined, number_of, weight_of
from .norm_tail import ARGUMENTS, norm_tail

WARPS = 8
THREADS = 32 * WARPS
ROWS = 16  # of a warp
TURNS = 2  # blocks that a warp takes before sums meet
WORDS = 128  # sums of 16 rows and 8 columns


def row_sums(format: str, sides: int) -> Callable:
    """A function that puts the sums of a block's rows, of `sides` matrices, to shared memory.

    It returns them: f32 [rows / 16, sides, 128], each found by `row_of` and `column_of`; all
    threads come, and have met at its end. even, odd: the matrices, of `n_rows`; row: the first
    of the warp's 16; x: columns from piece `column` on, `live` of them, `units` of 8 values each.
    """
    half, split = HALVES[format], splitter(format)
    PIECES, SCALED, mma, SIDES = half.pieces, half.scaled, half.multiply, sides
    SLOTS = WARPS * TURNS
    parts, scales = shared("f32", 2 * SLOTS * SIDES * WORDS), shared("f32", 2 * SLOTS * 8)
    totals, raw_words = shared("f32", WARPS * SIDES * WORDS), registers("u32", 16 * SIDES)
    eight_values, split_words = registers("f32", 16), registers("u32", 4 * PIECES)
    fragments = registers("f32", 8 * SIDES)

    def fetch(raw, even, odd, row, n_rows, row_pieces, units, block):
        """Of both rows of a lane 8 values of each half of a block."""
        lane = u32(thread_x() & 31)
        for h in range(2):
            unit = u32(min(u32(UNITS * block + 4 * h + (lane & 3)), u32(units - 1)))
            for r in range(2):
                own = u32(min(u32(row + (lane >> 2) + 8 * r), u32(n_rows - 1)))
                at = u32(own * row_pieces + unit)
                for side in range(SIDES):
                    weights = even if side == 0 else odd
                    a, to = constant4(weights, at), 16 * side + 8 * r + 4 * h
                    raw[to], raw[to + 1], raw[to + 2], raw[to + 3] = a[0], a[1], a[2], a[3]

    def fetch_column(values, x, column, live, units, block):
        """Of the lane's column the same."""
        lane = u32(thread_x() & 31)
        for i in range(16):
            values[i] = f32(0)
        for h in range(2):
            unit = u32(UNITS * block + 4 * h + (lane & 3))
            if (lane >> 2) < live and unit < units:
                piece = u32(u32(column + (lane >> 2) * u32(2 * units)) + 2 * unit)
                read_unit(values, 8 * h, x, piece)

    def multiply(d, raw, words, h):
        """Products of a half block: of the last piece, which is the smallest, first."""
        none = u32(0)
        for q in range(PIECES):
            for j in range(2):
                a = 4 * (PIECES - 1 - q) + 2 * j
                for n in range(2 * SIDES):
                    w, to = 8 * n + 4 * h + 2 * j, 4 * n
                    d[to], d[to + 1], d[to + 2], d[to + 3] = mma(
                        words[a], none, words[a + 1], none, raw[w], raw[w + 1],
                        d[to], d[to + 1], d[to + 2], d[to + 3],
                    )  # fmt: skip

    def put(kept, factors, slot, d, peak):
        lane = u32(thread_x() & 31)
        for side in range(SIDES):
            piece = u32(u32((slot * SIDES + side) * 32) + lane)
            at = 8 * side
            shared_store4(kept, piece, d[at], d[at + 1], d[at + 4], d[at + 5])
        if SCALED and (lane & 3) == 0:
            factors[u32(8 * slot + (lane >> 2))] = scale_of(peak)

    def add(found, kept, factors, first_slot, first, blocks, live, shift):
        """Blocks from `first` on to the sums of all rows, in order."""
        job, together = u32(thread_x()), u32(u32(1) << shift)
        while job < u32(u32(u32(WARPS) >> shift) * (SIDES * WORDS)):
            word, part = u32(job & (WORDS - 1)), u32(job // WORDS)
            c, warp = column_of(word), u32(u32(part // SIDES) << shift)
            if c < live:
                total = f32(0)
                if first > 0:
                    total = found[job]
                slot = u32(first_slot + warp * TURNS)
                at = u32(u32((slot * SIDES + part % SIDES) * WORDS) + word)
                for turn in range(TURNS):
                    block = u32(first + turn * together)
                    count = u32(min(u32(blocks - block), together)) if block < blocks else u32(0)
                    for k in range(WARPS):
                        if k < count:
                            value = kept[u32(at + (k * TURNS + turn) * (SIDES * WORDS))]
                            if SCALED:
                                scale = factors[u32(8 * (slot + k * TURNS + turn) + c)]
                                total = fma(value, scale, total)
                            else:
                                total += value
                found[job] = total
            job = u32(job + THREADS)

    def sums(even, odd, row, n_rows, x, column, live, row_pieces, units, shift):
        kept, factors, found = parts(), scales(), totals()
        raw, values, words, d = raw_words(), eight_values(), split_words(), fragments()
        blocks, together = u32(u32(units + (UNITS - 1)) // UNITS), u32(u32(1) << shift)
        warp, first, buffer = u32(thread_x() >> 5), u32(0), u32(0)
        while first < blocks:
            for turn in range(TURNS):
                block = u32(first + turn * together + (warp & u32(together - 1)))
                block = u32(min(block, u32(blocks - 1)))
                fetch(raw, even, odd, row, n_rows, row_pieces, units, block)
                fetch_column(values, x, column, live, units, block)
                peak, up = f32(0), f32(1)
                if SCALED:
                    peak = peak_of(values, 0, 16)
                    peak = fmax(peak, shuffle_xor(peak, 1))
                    peak = fmax(peak, shuffle_xor(peak, 2))
                    up = factor_of(peak)
                for i in range(8 * SIDES):
                    d[i] = f32(0)
                for h in range(2):
                    split(words, 0, values, 8 * h, up)
                    multiply(d, raw, words, h)
                put(kept, factors, u32(buffer + warp * TURNS + turn), d, peak)
            syncthreads()
            add(found, kept, factors, buffer, first, blocks, live, shift)
            first, buffer = u32(first + TURNS * together), u32(SLOTS - buffer)
        syncthreads()
        return found

    return sums


def row_of(word):
    """Of the sums of 16 rows and 8 columns, four words a lane: which row a word is of."""
    return u32(8 * ((word >> 1) & 1) + 2 * ((word >> 2) & 3) + (word & 1))


def column_of(word):
    """Which column."""
    return u32(word >> 4)


def rows_begin(weights, row, n_rows, row_pieces):
    """Bring the beginning of a warp's rows near: of each 256 bytes, as a prefetch."""
    lane = u32(thread_x() & 31)
    own = u32(min(u32(row + (lane & (ROWS - 1))), u32(n_rows - 1)))
    at = u32(8 * (lane >> 4))
    if at < row_pieces:
        ahead(weights, u32(4 * u32(own * row_pieces + at)))


@constants(format=tuple(HALVES), gated=(False, True))
def build_matvec_half(format: str, gated: bool) -> Declared:
    """out[c, row] = sum over k of w[row, k] x[c, k], + b[row] + residual[c, row], of each weight.

    As `matvec`, of rows of `row_pieces` pieces and `units` of 8 values; columns f32, as long.
    gated: weights 0 and 1 are gate and up. Grid (blocks of all weights, columns / 8).
    """
    SIDES, GATE = 1 + gated, gated
    products, tail = row_sums(format, SIDES), norm_tail(WARPS)

    @entry(f"{POINTERS} x:f32* {NUMBERS} units:u32 {ARGUMENTS}", threads=THREADS)
    def matvec_half(
        w0, w1, w2, w3, b0, b1, b2, b3, out0, out1, out2, out3, residual, live, x, n0, n1, n2, n3,
        first1, first2, first3, n_columns, residual_stride, sums, gate, turns, alpha, limit, plus,
        shift, row_pieces, units, norm_x, norm_w, normed, norm_packed, tickets, norm_n,
        norm_eps, norm_stretches, norm_length, norm_to,
    ):  # fmt: skip
        launch_next()
        which = weight_of(block_x(), first1, first2, first3)
        n_rows = number_of(which, n0, n1, n2, n3)
        even, out = pick(which, w0, w1, w2, w3), pick(which, out0, out1, out2, out3)
        bias = pick(which, b0, b1, b2, b3)
        own = u32(block_x() - number_of(which, u32(0), first1, first2, first3))
        rows = u32(ROWS * u32(u32(WARPS) >> shift))
        start = u32(own * rows)
        row = u32(start + ROWS * u32(u32(thread_x() >> 5) >> shift))
        rows_begin(even, row, n_rows, row_pieces)
        if GATE:
            rows_begin(w1, row, n_rows, row_pieces)
        launch_wait()
        column = u32(8 * block_y())
        if column >= load(live, 0):
            return
        there, first = u32(min(u32(n_columns - column), u32(8))), u32(column * u32(2 * units))
        found = products(even, w1, row, n_rows, x, first, there, row_pieces, units, shift)
        job = u32(thread_x())
        while job < 8 * rows:
            word, part = u32(job & (WORDS - 1)), u32(SIDES * (job // WORDS))
            r, c = u32(start + ROWS * (job // WORDS) + row_of(word)), column_of(word)
            if r < n_rows and c < there:
                value = found[u32(part * WORDS + word)]
                if (sums >> which) & 1:
                    value += load(bias, r)
                if GATE:
                    up = found[u32(u32(part + 1) * WORDS + word)]
                    if sums & 2:
                        up += load(b1, r)
                    value = joined(value, up, alpha, limit, plus)
                if sums & RESIDUAL:
                    value += load(residual, u32(u32(column + c) * residual_stride + r))
                store(out, u32(u32(column + c) * n_rows + r), value)
            job = u32(job + THREADS)
        if n_columns == 1:
            tail(
                norm_x, norm_w, normed, norm_packed, tickets, norm_n, norm_eps,
                norm_stretches, norm_length, norm_to,
            )  # fmt: skip

    return matvec_half


def warps_of(inner: int) -> int:
    """Warps that share rows of `inner` values: no more than there are blocks of k."""
    blocks = -(-inner // (8 * UNITS))
    return min(WARPS, 1 << blocks.bit_length() - 1)
