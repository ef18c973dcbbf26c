"""Float32 weights times many columns of float32: prompts. No tensor core: every product is a fma.

A block of 256 threads computes 128 rows of `width` columns, a thread 8 rows, 16 apart, and a
16th of the columns. The sum is that of `matvec_float`, bit for bit: stretch after stretch, of which
4 units of 8 values are a stage. Weights and columns are copied while the stage before is summed.
Of experts a tile is of columns that chose the same one, listed by `expert_group`.

Shared memory of a stage, in pieces of 16 bytes: weights [row, 8], columns [column, 8], those of row
or column n at their place ^ (n & 7). Then words: columns of x, and rows of out.
"""

from __future__ import annotations

from collections.abc import Callable

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
    launch_next,
    launch_wait,
    load,
    registers,
    shared_load4,
    store,
    syncthreads,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.plan.catalogue import constants

from .tile_ends import NUMBERS, POINTERS, ROWS, THREADS, WIDTHS, opener

PIECES = 8  # of a row or column in a stage
UNITS = PIECES // 2
EACH = ROWS // 16  # rows of a thread


def _unit_of(i, first, stretches, units):
    """Of piece i of a stage whose units are `stretches` apart from `first` on: the unit, or end."""
    return u32(min(u32(first + u32((i & (PIECES - 1)) >> 1) * stretches), units))


def _copy(tiles, to, source, row, n, i, unit, units):
    """Begin to copy piece i of row n, which is `row` of a matrix; zeros behind its end."""
    nbytes = u32(16) if unit < units else u32(0)
    at = u32(row * u32(2 * units) + 2 * min(unit, u32(units - 1)) + (i & 1))
    place = u32(PIECES * n + ((i & (PIECES - 1)) ^ (n & 7)))
    copy_async16(tiles, u32(to + place), source, at, nbytes)


def _summer(width: int) -> Callable:
    """Add a stage's products to acc [8 rows, width / 16 columns], value after value."""
    COLUMNS, WEIGHTS = width // 16, ROWS * PIECES
    values = registers("f32", 4 * COLUMNS)

    def add(acc, numbers, stage):
        x, lane = values(), u32(thread_x() & 15)
        row = u32(thread_x() >> 4)
        for p in range(PIECES):
            at = u32(u32(stage + WEIGHTS) + PIECES * lane + (p ^ (lane & 7)))
            for c in range(COLUMNS):
                a = shared_load4(numbers, u32(at + 16 * PIECES * c))
                for k in range(4):
                    x[4 * c + k] = a[k]
            at = u32(stage + PIECES * row + (p ^ (row & 7)))
            for r in range(EACH):
                w = shared_load4(numbers, u32(at + 16 * PIECES * r))
                for c in range(COLUMNS):
                    for k in range(4):
                        n = r * COLUMNS + c
                        acc[n] = fma(w[k], x[4 * c + k], acc[n])

    return add


@constants(width=WIDTHS)
def build_tile_float(width: int) -> Declared:
    """out[c, row] = sum over k of weights[row, k] x[c, k] + bias[row] + residual[c, row].

    `weights`, `x`: rows and columns of `units` of 8 values, whose sum is cut into `stretches`. The
    rest, and groups of experts, as in `tile`. Grid (rows / 128, columns / width or groups).
    """
    COLUMNS, WIDTH, STAGE = width // 16, width, (ROWS + width) * PIECES
    SOURCE, TARGET, N = 8 * STAGE, 8 * STAGE + width, EACH * width // 16
    shared_words, shared_numbers = dynamic_shared("u32"), dynamic_shared("f32")
    accumulators, totals, add = registers("f32", N), registers("f32", N), _summer(width)
    WEIGHTS, begin = ROWS * PIECES, opener(width, SOURCE, TARGET)

    def copy(tiles, stage, weights, x, expert_row, row, rows, unit, stretches, units):
        for n in range(WEIGHTS // THREADS):
            i = u32(thread_x() + n * THREADS)
            r = u32(i // PIECES)
            own = u32(expert_row + min(u32(row + r), u32(rows - 1)))
            _copy(tiles, stage, weights, own, r, i, _unit_of(i, unit, stretches, units), units)
        for n in range(WIDTH * PIECES // THREADS):
            i = u32(thread_x() + n * THREADS)
            c = u32(i // PIECES)
            own = tiles[u32(SOURCE + c)]
            to = u32(stage + WEIGHTS)
            _copy(tiles, to, x, own, c, i, _unit_of(i, unit, stretches, units), units)
        copy_commit()

    def finish(total, out, bias, residual, tiles, count, row, rows, own, stride, added, sums):
        for c in range(COLUMNS):
            column = u32((thread_x() & 15) + 16 * c)
            to = tiles[u32(TARGET + min(column, u32(count - 1)))]
            left = rows if column < count else u32(0)
            for r in range(EACH):
                at = u32(row + (thread_x() >> 4) + 16 * r)
                if at < left:
                    value = total[r * COLUMNS + c]
                    if sums & 1:
                        value += load(bias, u32(own + at))
                    if sums & 2:
                        value += load(residual, u32(u32(to * added) + at))
                    store(out, u32(u32(to * stride) + at), value)

    @entry(
        f"weights:f32* x:f32* {POINTERS} units:u32 stretches:u32 {NUMBERS}",
        threads=THREADS,
        shared_nbytes=4 * (TARGET + width),
    )
    def tile_float(
        weights, x, out, bias, residual, groups, order, live, rows, units, stretches, out_stride,
        residual_stride, every, grouped, sums,
    ):  # fmt: skip
        launch_next()
        tiles, numbers, acc, total = shared_words(), shared_numbers(), accumulators(), totals()
        launch_wait()
        expert, count = begin(tiles, groups, order, live, every, grouped)
        if count == 0:
            return
        row, own, step = u32(block_x() * ROWS), u32(expert * rows), u32(UNITS * stretches)
        for n in range(N):
            acc[n], total[n] = f32(0), f32(0)
        stretch, unit, stage = u32(0), u32(0), u32(0)
        copy(tiles, stage, weights, x, own, row, rows, unit, stretches, units)
        while stretch < stretches:
            copy_wait0()
            syncthreads()
            last, following = u32(unit + step) >= units, u32(unit + step)
            if last:
                stretch = u32(stretch + 1)
                following = stretch
            if stretch < stretches:
                other = u32(STAGE - stage)
                copy(tiles, other, weights, x, own, row, rows, following, stretches, units)
            add(acc, numbers, stage)
            if last:
                for n in range(N):
                    total[n] += acc[n]
                    acc[n] = f32(0)
            unit, stage = following, u32(STAGE - stage)
        finish(
            total, out, bias, residual, tiles, count, row, rows, own, out_stride, residual_stride,
            sums,
        )  # fmt: skip

    return tile_float
