"""How tiles begin and end: which columns a block of threads multiplies, and where their sums go."""

from __future__ import annotations

from collections.abc import Callable

from runtime.backends.cuda.intrinsics import (
    block_y,
    load,
    load4,
    store,
    store2,
    syncthreads,
    thread_x,
    u32,
)  # fmt: skip

THREADS = 256
ROWS = 128  # of a block of threads
WIDTHS = (32, 128)

POINTERS = "out:f32* bias:f32* residual:f32* groups:u32* order:u32* live:u32* rows:u32"
NUMBERS = "out_stride:u32 residual_stride:u32 every:u32 grouped:u32 sums:u32"


def opener(width: int, source: int, target: int) -> Callable:
    """A function of a block's tile that gives its expert and how many columns it has.

    Which columns of `x` they are is put to `width` words of `tiles` from `source` on, which rows of
    `out` from `target` on, those of the last one behind it; unless there is none, threads have met.
    """
    WIDTH, SOURCE, TARGET = width, source, target

    def begin(tiles, groups, order, live, every, grouped):
        expert, first = u32(0), u32(block_y() * WIDTH)
        if grouped:
            group = load4(groups, block_y())
            expert, first, count = u32(group[0]), u32(group[1]), u32(group[2])
        else:
            columns = u32(load(live, u32(0)))
            count = min(u32(columns - first), u32(WIDTH)) if columns > first else u32(0)
        if count > 0:
            if thread_x() < WIDTH:
                choice = u32(first + min(thread_x(), u32(count - 1)))
                if grouped:
                    choice = u32(load(order, choice))
                tiles[u32(SOURCE + thread_x())] = u32(choice // every)
                tiles[u32(TARGET + thread_x())] = choice
            syncthreads()
        return expert, count

    return begin


def storer(columns: int, rows: int) -> Callable:
    """A warp's totals plus bias and residual to `out`; two neighbouring rows are one access.

    Lanes have what `tile_products.py` says of each matrix of 16 columns x 8 rows.
    """
    M, N = columns // 16, rows // 8

    def add_bias(total, bias, first_bias, row, rows):
        for n in range(N):
            r = u32(min(u32(row + 8 * n), u32(rows - 1)))
            other = u32(min(u32(r + 1), u32(rows - 1)))
            first, second = load(bias, u32(first_bias + r)), load(bias, u32(first_bias + other))
            for m in range(2 * M):
                at = 4 * (m // 2 * N + n) + 2 * (m % 2)
                total[at] += first
                total[at + 1] += second

    def add_residual(total, residual, tiles, target, column, count, row, rows, stride):
        for m in range(2 * M):
            c = u32(min(u32(column + 8 * m), u32(count - 1)))
            c = u32(tiles[u32(target + c)] * stride)
            for n in range(N):
                at = 4 * (m // 2 * N + n) + 2 * (m % 2)
                r = u32(min(u32(row + 8 * n), u32(rows - 1)))
                total[at] += load(residual, u32(c + r))
                total[at + 1] += load(residual, u32(c + min(u32(r + 1), u32(rows - 1))))

    def put(total, out, tiles, target, column, count, row, rows, stride):
        even = (stride & 1) == 0
        for m in range(2 * M):
            c = u32(column + 8 * m)
            place = u32(tiles[u32(target + min(c, u32(count - 1)))] * stride)
            place = u32(place + row)
            left = rows if c < count else u32(0)
            for n in range(N):
                r, to = u32(row + 8 * n), u32(place + 8 * n)
                at = 4 * (m // 2 * N + n) + 2 * (m % 2)
                if even and u32(r + 1) < left:
                    store2(out, u32(to >> 1), total[at], total[at + 1])
                elif r < left:
                    store(out, to, total[at])
                    if u32(r + 1) < left:
                        store(out, u32(to + 1), total[at + 1])

    def finish(
        total, out, bias, residual, tiles, target, count, columns, row, rows, biases, out_stride,
        residual_stride, sums,
    ):  # fmt: skip
        lane = u32(thread_x() & 31)
        column, row = u32(columns + (lane >> 2)), u32(row + 2 * (lane & 3))
        if sums & 1:
            add_bias(total, bias, biases, row, rows)
        if sums & 2:
            add_residual(total, residual, tiles, target, column, count, row, rows, residual_stride)
        put(total, out, tiles, target, column, count, row, rows, out_stride)

    return finish
