"""Quantised weights times many columns of int8 activations on int8 tensor cores: prompts.

A block of 8 warps computes 128 rows of `width` columns of the output. Two blocks of 32 values along
k are a stage: one is multiplied while the next is read, its weights turned into bytes on the way
(a thread a block). The sum is the canonical one of `layouts.py`, bit for bit that of matvec.

A product of 32 values, or of each half of them, is one exact mma whose accumulator starts at MAGIC,
the bits of 1.5 x 2^23: the result's bits are the float 1.5 x 2^23 + sum. Times the row's scale y,
less 1.5 x 2^23 y, which is exact: one fma gives y x sum, rounded once.

Shared memory of a stage, in pieces of 16 bytes: activations [half, block, column], weights [half,
block, row], (scale, sums) of both blocks [column]; then floats of rows [kind, block, row].
Of experts a tile is of columns that chose the same one, listed by `expert_group`.
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
    launch_next,
    launch_wait,
    registers,
    shared_store4,
    syncthreads,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.cuda.layouts import FORMATS
from runtime.backends.plan.catalogue import constants

from .tile_ends import NUMBERS, POINTERS, ROWS, THREADS, WIDTHS, opener, storer
from .tile_formats import RAW, Form, form_of
from .tile_products import BLOCKS, PLANE, ROW_STRIDE, multiplier


class Shape(NamedTuple):
    """How a block of threads divides `width` columns x ROWS rows among its warps."""

    width: int

    @property
    def warps_by_column(self) -> int:
        """Warps side by side over columns; the others share the rows."""
        return 2 if self.width >= 64 else 1

    @property
    def columns(self) -> int:
        """Of a warp."""
        return self.width // self.warps_by_column

    @property
    def rows(self) -> int:
        """Of a warp."""
        return ROWS * self.warps_by_column // 8

    @property
    def stride(self) -> int:
        """Pieces between blocks of activations."""
        return self.width + 4

    def words(self, form: Form) -> tuple[int, int, int, int]:
        """Where weights, scales of columns and floats of rows begin, and the end of a stage."""
        weights = 4 * (2 * BLOCKS * self.stride)
        scales = weights + 4 * (2 * BLOCKS * ROW_STRIDE)
        floats = scales + 4 * self.width
        return weights, scales, floats, floats + form.numbers * PLANE


def _column_copier(shape: Shape) -> Callable:
    """Begin copying a stage of activations; tiles[source + n]: which column of `x` is the n-th."""
    PIECES, STRIDE, WIDTH = 2 * BLOCKS * shape.width, shape.stride, shape.width
    SCALES = shape.words(form_of("Q8_0"))[1] // 4

    def copy(tiles, target, x, source, place, places):
        i, column_pieces = thread_x(), u32(5 * (places >> 1))
        while i < PIECES:
            block, column = u32(i & 1), u32(u32(i >> 1) & (WIDTH - 1))
            half = u32(i // (2 * WIDTH))
            to = u32(u32(half * BLOCKS + block) * STRIDE + column)
            origin = u32(
                u32(tiles[u32(source + column)] * column_pieces) + u32(half * places) + place
            )
            copy_async16(tiles, u32(target + to), x, u32(origin + block), u32(16))
            i = u32(i + THREADS)
        if thread_x() < WIDTH:
            origin = u32(tiles[u32(source + thread_x())] * column_pieces)
            origin = u32(u32(origin + 2 * places) + (place >> 1))
            copy_async16(tiles, u32(target + SCALES + thread_x()), x, origin, u32(16))

    return copy


def _row_keeper(shape: Shape, form: Form) -> Callable:
    """Store what was fetched of a block as signed bytes and floats."""
    WEIGHTS, _, FLOATS, _ = shape.words(form)
    unpack, scale, NUMBERS = form.unpack, form.scale, form.numbers
    eight, few = registers("u32", 8), registers("f32", NUMBERS)

    def keep(tiles, numbers, stage, raw):
        words, own = eight(), few()
        unpack(raw, words)
        scale(raw, own)
        row, block = u32(thread_x() >> 1), u32(thread_x() & 1)
        piece = u32(u32((stage + WEIGHTS) >> 2) + u32(block * ROW_STRIDE + row))
        shared_store4(tiles, piece, words[0], words[1], words[2], words[3])
        piece = u32(piece + BLOCKS * ROW_STRIDE)
        shared_store4(tiles, piece, words[4], words[5], words[6], words[7])
        for n in range(NUMBERS):
            at = u32(u32(stage + FLOATS + n * PLANE) + u32(block * ROWS + row))
            numbers[at] = own[n]

    return keep


@constants(format=tuple(FORMATS), width=WIDTHS)
def build_tile(format: str, width: int) -> Declared:
    """out[c, row] = sum over k of weights[row, k] x[c, k] + bias[row] + residual[c, row].

    `weights` and `x` packed: rows of `row_pieces`, their parts at words `high`, `scales`, `supers`,
    and columns; their `blocks` are cut into `stretches` of `length`. out f32 [.., out_stride];
    `sums`: 1 with a bias, 2 with a residual, 3 with both. live: how many columns mean something.
    Grid (rows / 128, columns / width).

    With `grouped` columns are choices of experts, and the grid is (rows / 128, groups). groups u32
    [.., 4]: expert, first in `order`, columns; `order`: the choices, each a row of `out`, `every`
    of which share a column of x. Experts have `rows` rows and biases each, one after another.
    """
    form, shape = form_of(format), Shape(width)
    *_, STAGE = shape.words(form)
    SOURCE, TARGET = 2 * STAGE, 2 * STAGE + width  # words: columns of x, and rows of out
    SIDE, COLUMNS, WARP_ROWS = shape.warps_by_column, shape.columns, shape.rows
    N = shape.columns * shape.rows // 32
    copy, keep, fetch = _column_copier(shape), _row_keeper(shape, form), form.fetch
    multiply = multiplier(shape, form)
    begin, finish = opener(width, SOURCE, TARGET), storer(shape.columns, shape.rows)
    shared_words, shared_numbers = dynamic_shared("u32"), dynamic_shared("f32")
    accumulators, stretch_totals, raw_words = (
        registers("f32", N),
        registers("f32", N),
        registers("u32", RAW),
    )

    @entry(
        f"weights:u32* x:u32* {POINTERS} row_pieces:u32 high:u32 scales:u32 supers:u32 blocks:u32 "
        f"length:u32 stretches:u32 {NUMBERS}",
        threads=THREADS,
        shared_nbytes=4 * (TARGET + width),
    )
    def tile(
        weights, x, out, bias, residual, groups, order, live, rows, row_pieces, high, scales,
        supers, blocks, length, stretches, out_stride, residual_stride, every,
        grouped, sums,
    ):  # fmt: skip
        launch_next()
        tiles, numbers = shared_words(), shared_numbers()
        acc, total, raw = accumulators(), stretch_totals(), raw_words()
        launch_wait()
        expert, count = begin(tiles, groups, order, live, every, grouped)
        if count == 0:
            return
        places = u32(length * stretches)
        mine, odd = u32(block_x() * ROWS + (thread_x() >> 1)), u32(thread_x() & 1)
        row = u32(u32(u32(expert * rows) + min(mine, u32(rows - 1))) * u32(4 * row_pieces))
        warp = u32(thread_x() >> 5)
        my_columns = u32(u32(warp & (SIDE - 1)) * COLUMNS)
        my_rows = u32(u32(warp // SIDE) * WARP_ROWS)
        for n in range(N):
            acc[n], total[n] = f32(0), f32(0)
        pairs, turn = u32(u32(blocks + 1) >> 1), u32(0)
        step, stretch, stage = u32(0), u32(0), u32(0)
        while turn <= pairs:  # one pair is read while the one before it is multiplied
            more = turn < pairs
            if more:
                place = u32(2 * u32(u32(step * stretches) + stretch))
                copy(tiles, u32(stage >> 2), x, u32(SOURCE), place, places)
                copy_commit()
                own = u32(min(u32(2 * turn + odd), u32(blocks - 1)))
                fetch(raw, weights, row, u32(place + odd), own, places, high, scales, supers)
            if turn > 0:
                multiply(acc, tiles, numbers, u32(STAGE - stage), my_columns, my_rows)
                if step == 0 or not more:
                    for n in range(N):
                        total[n] += acc[n]
                        acc[n] = f32(0)
            if more:
                keep(tiles, numbers, stage, raw)
                copy_wait0()
                syncthreads()
            turn, step, stage = u32(turn + 1), u32(step + 1), u32(STAGE - stage)
            if step == u32(length >> 1):
                step, stretch = u32(0), u32(stretch + 1)
        finish(
            total, out, bias, residual, tiles, u32(TARGET), count, my_columns,
            u32(block_x() * ROWS + my_rows), rows, u32(expert * rows), out_stride,
            residual_stride, sums,
        )  # fmt: skip

    return tile
