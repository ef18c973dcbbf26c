"""Weights in f16 or bf16 times many columns of float32 on tensor cores: prompts.

A block of 8 warps computes 128 rows of `width` columns. A block of 64 values along k is a stage:
its weights are copied as they lie while the one before is multiplied; its columns are read then
too, and split into pieces (`halves.py`) when that is done. The sum is that of `matvec_half`, bit
for bit. Of experts a tile is of columns that chose the same one, listed by `expert_group`.

Shared memory, in pieces of 16 bytes: weights of two stages [row, 8], of odd rows the halves of 64
values swapped: so eight lanes hit all banks; columns [piece, 16 columns, half, j, lane], what a
lane needs for an mma. Then floats: scales of columns; words: columns of x, and rows of out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    copy_async16,
    copy_commit,
    copy_wait0,
    dynamic_shared,
    entry,
    f32,
    fma,
    fmax,
    launch_next,
    launch_wait,
    registers,
    shared_load4,
    shared_store4,
    shuffle_xor,
    syncthreads,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.plan.catalogue import constants

from .halves import HALVES, UNITS, factor_of, peak_of, read_unit, scale_of, splitter
from .tile_ends import NUMBERS, POINTERS, ROWS, THREADS, WIDTHS, opener, storer

WEIGHTS = ROWS * UNITS  # pieces of a stage
COLUMNS = 16  # of a warp


class Shape(NamedTuple):
    """How a block of threads divides `width` columns x ROWS rows among its warps."""

    width: int
    pieces: int

    @property
    def warps_by_column(self) -> int:
        """Warps side by side over columns, 16 each; the others share the rows."""
        return self.width // COLUMNS

    @property
    def rows(self) -> int:
        """Of a warp."""
        return ROWS * self.warps_by_column // 8

    @property
    def pairs(self) -> int:
        """Of columns, of which a thread has 8 values at a time."""
        return max(1, 4 * self.width // THREADS)

    @property
    def scales(self) -> int:
        """Word at which the scales of columns begin: behind all pieces."""
        return 4 * (2 * WEIGHTS + self.pieces * self.width * UNITS)


def place_of(row, unit):
    """The piece of 8 values of a row in its stage."""
    return u32(UNITS * row + (unit ^ ((row & 1) << 2)))


def copy_rows(tiles, to, weights, expert_row, first, rows, row_pieces, units, block):
    """Begin to copy a stage of weights; zeros behind the last row, and behind the end of rows."""
    own = u32(thread_x() & (UNITS - 1))
    row, unit = u32(thread_x() // UNITS), u32(UNITS * block + own)
    at, place = u32(u32(expert_row + first + row) * row_pieces + unit), u32(to + place_of(row, own))
    left = u32(rows - first) if unit < units else u32(0)
    for n in range(UNITS * ROWS // THREADS):
        further = n * (THREADS // UNITS)
        there = u32(row + further) < left
        source = u32(at + further * row_pieces) if there else u32(0)
        nbytes = u32(16) if there else u32(0)
        copy_async16(tiles, u32(place + UNITS * further), weights, source, nbytes)


def column_splitter(shape: Shape, format: str) -> tuple[Callable, Callable]:
    """fetch: a thread's share of a stage of columns to registers; keep: its pieces from there.

    A thread has 8 values of two columns, 8 apart, or of two such pairs: 4 lanes, and 4 others 8
    lanes on, have a column's 64 values.
    """
    half, split, SCALES = HALVES[format], splitter(format), shape.scales
    PIECES, SCALED, PAIRS = half.pieces, half.scaled, shape.pairs
    SOURCE, USED, PLANE = SCALES + shape.width, 4 * shape.width, shape.width * UNITS
    words_of, peaks = registers("u32", 8 * half.pieces), registers("f32", 2 * shape.pairs)

    def unit_and_column(pair):
        """The thread's unit of 8 values, and the lower column of its pair number `pair`."""
        i = u32(thread_x() + pair * THREADS)
        unit = u32((i & 3) + 4 * ((i >> 3) & 1))
        number = u32(((i >> 2) & 1) + 2 * (i >> 4))
        return unit, u32(16 * (number >> 3) + (number & 7))

    def fetch(values, tiles, x, units, block):
        for pair in range(PAIRS):
            own, column = unit_and_column(pair)
            unit = u32(UNITS * block + own)
            for i in range(16):
                values[16 * pair + i] = f32(0)
            if unit < units and thread_x() < USED:
                for side in range(2):
                    source = tiles[u32(SOURCE + column + 8 * side)]
                    piece = u32(u32(source * u32(2 * units)) + 2 * unit)
                    read_unit(values, 16 * pair + 8 * side, x, piece)

    def find_peaks(found, values):
        for n in range(2 * PAIRS):
            peak = peak_of(values, 8 * n, 8)
            peak = fmax(peak, shuffle_xor(peak, 1))
            peak = fmax(peak, shuffle_xor(peak, 2))
            found[n] = fmax(peak, shuffle_xor(peak, 8))

    def keep(values, tiles, numbers):
        words, peak = words_of(), peaks()
        if SCALED:
            find_peaks(peak, values)
        for pair in range(PAIRS):
            unit, column = unit_and_column(pair)
            for side in range(2):
                up, n = f32(1), 2 * pair + side
                if SCALED:
                    up = factor_of(peak[n])
                split(words, 4 * PIECES * side, values, 8 * n, up)
            if thread_x() < USED:
                if SCALED and unit == 0:
                    numbers[u32(SCALES + column)] = scale_of(peak[2 * pair])
                    numbers[u32(SCALES + column + 8)] = scale_of(peak[2 * pair + 1])
                at = u32(2 * WEIGHTS + 128 * (column >> 4) + 64 * (unit >> 2))
                at = u32(at + 4 * (column & 7) + (unit & 3))
                for p in range(PIECES):
                    for j in range(2):
                        a, b, to = 4 * p + 2 * j, 4 * (PIECES + p) + 2 * j, p * PLANE + 32 * j
                        shared_store4(
                            tiles, u32(at + to), words[a], words[b], words[a + 1], words[b + 1]
                        )  # fmt: skip

    return fetch, keep


def multiplier(shape: Shape, format: str) -> Callable:
    """Add a stage's products to `total` [8 rows, 4] of a warp."""
    half = HALVES[format]
    N, PIECES, SCALED, mma = shape.rows // 8, half.pieces, half.scaled, half.multiply
    SCALES, PLANE = shape.scales, shape.width * UNITS
    sums, column_words = registers("f32", 4 * N), registers("u32", 8 * PIECES)

    def half_block(d, a, tiles, stage, rows, columns, lane, h):
        at = u32(u32(2 * WEIGHTS + 128 * (columns >> 4)) + u32(64 * h + lane))
        for q in range(PIECES):
            for j in range(2):
                word = shared_load4(tiles, u32(at + (PIECES - 1 - q) * PLANE + 32 * j))
                for k in range(4):
                    a[8 * q + 4 * j + k] = word[k]
        at = u32(stage + place_of(u32(rows + (lane >> 2)), u32(4 * h + (lane & 3))))
        for n in range(N):
            w, to = shared_load4(tiles, u32(at + 8 * UNITS * n)), 4 * n
            for q in range(PIECES):
                i = 8 * q
                d[to], d[to + 1], d[to + 2], d[to + 3] = mma(
                    a[i], a[i + 1], a[i + 2], a[i + 3], w[0], w[1],
                    d[to], d[to + 1], d[to + 2], d[to + 3],
                )  # fmt: skip
                d[to], d[to + 1], d[to + 2], d[to + 3] = mma(
                    a[i + 4], a[i + 5], a[i + 6], a[i + 7], w[2], w[3],
                    d[to], d[to + 1], d[to + 2], d[to + 3],
                )  # fmt: skip

    def multiply(total, tiles, numbers, stage, rows, columns):
        d, a, lane = sums(), column_words(), u32(thread_x() & 31)
        for i in range(4 * N):
            d[i] = f32(0)
        half_block(d, a, tiles, stage, rows, columns, lane, u32(0))
        half_block(d, a, tiles, stage, rows, columns, lane, u32(1))
        for i in range(2):
            scale = f32(1)
            if SCALED:
                scale = numbers[u32(SCALES + columns + 8 * i + (lane >> 2))]
            for n in range(2 * N):
                at = 4 * (n // 2) + 2 * i + n % 2
                if SCALED:
                    total[at] = fma(d[at], scale, total[at])
                else:
                    total[at] += d[at]

    return multiply


@constants(format=tuple(HALVES), width=WIDTHS)
def build_tile_half(format: str, width: int) -> Declared:
    """out[c, row] = sum over k of weights[row, k] x[c, k] + bias[row] + residual[c, row].

    `weights`: rows of `row_pieces`; x f32: columns; both of `units` of 8 values. The rest, and
    groups of experts, as in `tile`. Grid (rows / 128, columns / width or groups).
    """
    shape = Shape(width, HALVES[format].pieces)
    SOURCE, TARGET = shape.scales + width, shape.scales + 2 * width
    SIDE, WARP_ROWS, N = shape.warps_by_column, shape.rows, COLUMNS * shape.rows // 32
    fetch, keep = column_splitter(shape, format)
    begin, multiply = opener(width, SOURCE, TARGET), multiplier(shape, format)
    finish = storer(COLUMNS, shape.rows)
    shared_words, shared_numbers = dynamic_shared("u32"), dynamic_shared("f32")
    totals, column_values = registers("f32", N), registers("f32", 16 * shape.pairs)

    @entry(
        f"weights:u32* x:f32* {POINTERS} row_pieces:u32 units:u32 {NUMBERS}",
        threads=THREADS,
        shared_nbytes=4 * (TARGET + width),
    )
    def tile_half(
        weights, x, out, bias, residual, groups, order, live, rows, row_pieces, units, out_stride,
        residual_stride, every, grouped, sums,
    ):  # fmt: skip
        launch_next()
        tiles, numbers = shared_words(), shared_numbers()
        total, values = totals(), column_values()
        launch_wait()
        expert, count = begin(tiles, groups, order, live, every, grouped)
        if count == 0:
            return
        warp, row = u32(thread_x() >> 5), u32(block_x() * ROWS)
        my_columns = u32((warp & (SIDE - 1)) * COLUMNS)
        my_rows, own = u32((warp // SIDE) * WARP_ROWS), u32(expert * rows)
        for n in range(N):
            total[n] = f32(0)
        blocks, stage, block = u32(u32(units + (UNITS - 1)) // UNITS), u32(0), u32(0)
        copy_rows(tiles, stage, weights, own, row, rows, row_pieces, units, block)
        copy_commit()
        fetch(values, tiles, x, units, block)
        while block < blocks:
            keep(values, tiles, numbers)
            copy_wait0()
            syncthreads()
            following, other = u32(block + 1), u32(WEIGHTS - stage)
            if following < blocks:
                copy_rows(tiles, other, weights, own, row, rows, row_pieces, units, following)
                copy_commit()
                fetch(values, tiles, x, units, following)
            multiply(total, tiles, numbers, stage, my_rows, my_columns)
            syncthreads()
            block, stage = following, other
        finish(
            total, out, bias, residual, tiles, u32(TARGET), count, my_columns, u32(row + my_rows),
            rows, own, out_stride, residual_stride, sums,
        )  # fmt: skip

    return tile_half
