"""What a warp of a tile does: products of a stage on int8 tensor cores.

Lane 4 g + t has of each matrix of 16 columns x 8 rows columns g and g + 8, rows 2 t and 2 t + 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from runtime.backends.cuda.intrinsics import (
    bits_to_f32,
    dp2a,
    f32,
    fma,
    i32,
    int_to_f32,
    ldmatrix_x4,
    mma_s8,
    mma_s8_half,
    registers,
    shared_load2,
    thread_x,
    u32,
)  # fmt: skip

from .tile_ends import ROWS
from .tile_formats import Form

if TYPE_CHECKING:
    from .tile import Shape

MAGIC = 0x4B400000
MAGIC_F32 = f32(12582912)
BLOCKS = 2  # of 32 values, in a stage
PLANE = BLOCKS * ROWS  # floats of a kind
ROW_STRIDE = ROWS + 4  # pieces between blocks: their banks differ


def multiplier(shape: Shape, form: Form) -> Callable:
    """A stage's products, added to `acc` [16 columns, 8 rows, 4].

    Of formats with scales of halves 32 columns at a time: registers are short.
    """
    every = shape.columns // 16
    each = min(2, every) if form.halves else every
    part = _part(shape, form, 0, each)
    for first in range(each, every, each):
        part = _both(part, _part(shape, form, first, each))
    return part


def _both(one: Callable, other: Callable) -> Callable:
    def multiply(acc, tiles, numbers, stage, columns, rows):
        one(acc, tiles, numbers, stage, columns, rows)
        other(acc, tiles, numbers, stage, columns, rows)

    return multiply


def _part(shape: Shape, form: Form, first: int, count: int) -> Callable:
    """The products of `count` times 16 columns of a warp, from number `first` on."""
    _, SCALES, FLOATS, _ = shape.words(form)
    WEIGHTS, STRIDE = shape.words(form)[0] // 4, shape.stride
    M, N, FIRST = count, shape.rows // 8, first
    KINDS, MINIMA = 3 if form.halves else 1, form.minima
    fragments, weights, four = registers("u32", 4 * M), registers("u32", 4), registers("f32", 4)
    column_scales, column_sums = registers("f32", 2 * M), registers("f32", 4 * M)
    row_numbers, row_minima = registers("f32", 4 * KINDS), registers("f32", 4)
    dots = _dots_of_halves if form.halves else _dots

    def of_columns(x, xs, sums, tiles, numbers, stage, columns, block):
        """Fragments of the warp's columns, their scales and scaled sums."""
        lane = u32(thread_x() & 31)
        piece = u32((stage >> 2) + u32(u32((lane >> 4) * BLOCKS + block) * STRIDE))
        piece = u32(u32(piece + columns) + (lane & 15))
        for m in range(M):
            a = ldmatrix_x4(tiles, u32(piece + 16 * m))
            x[4 * m], x[4 * m + 1], x[4 * m + 2], x[4 * m + 3] = a[0], a[1], a[2], a[3]
        at = u32(u32(stage + SCALES + 2 * block) + u32(4 * u32(columns + (lane >> 2))))
        for m in range(2 * M):
            xs[m] = numbers[u32(at + 32 * m)]
            if MINIMA == 1:
                both = dp2a(tiles[u32(at + 32 * m + 1)], u32(0x0101), i32(0))
                sums[m] = xs[m] * int_to_f32(both)
            if MINIMA == 2:
                halves = tiles[u32(at + 32 * m + 1)]
                sums[m] = xs[m] * int_to_f32(dp2a(halves, u32(0x0001), i32(0)))
                sums[2 * M + m] = xs[m] * int_to_f32(dp2a(halves, u32(0x0100), i32(0)))

    def of_rows(own, least, numbers, at):
        """Numbers of the lane's two rows: scales, then what MAGIC adds to each; and minima."""
        for kind in range(KINDS):
            pair = shared_load2(numbers, u32(u32(at + kind * PLANE) >> 1))
            own[2 * kind], own[2 * kind + 1] = pair[0], pair[1]
            place = 2 * (KINDS + kind)
            own[place], own[place + 1] = pair[0] * -MAGIC_F32, pair[1] * -MAGIC_F32
        for kind in range(MINIMA):
            pair = shared_load2(numbers, u32(u32(at + (KINDS + kind) * PLANE) >> 1))
            least[2 * kind], least[2 * kind + 1] = pair[0], pair[1]

    def multiply(acc, tiles, numbers, stage, columns, rows):
        x, w, y = fragments(), weights(), four()
        xs, sums, own, least = column_scales(), column_sums(), row_numbers(), row_minima()
        lane, columns = u32(thread_x() & 31), u32(columns + 16 * FIRST)
        for block in range(BLOCKS):
            of_columns(x, xs, sums, tiles, numbers, stage, columns, block)
            piece = u32(u32((lane >> 3) & 1) * BLOCKS + block)
            piece = u32(u32((stage >> 2) + WEIGHTS) + u32(piece * ROW_STRIDE))
            piece = u32(u32(piece + rows) + u32((lane & 7) + 8 * (lane >> 4)))
            at = u32(u32(stage + FLOATS + block * ROWS) + u32(rows + 2 * (lane & 3)))
            for n in range(N):
                if n % 2 == 0:
                    two = ldmatrix_x4(tiles, u32(piece + 8 * n))
                    w[0], w[1], w[2], w[3] = two[0], two[1], two[2], two[3]
                of_rows(own, least, numbers, u32(at + 8 * n))
                for m in range(M):
                    dots(y, x, 4 * m, w, 2 * (n % 2), own)
                    to = 4 * ((FIRST + m) * N + n)
                    for i in range(4):
                        column = 2 * m + i // 2
                        acc[to + i] = fma(y[i], xs[column], acc[to + i])
                        if MINIMA > 0:
                            acc[to + i] = fma(least[i % 2], sums[column], acc[to + i])
                        if MINIMA > 1:
                            acc[to + i] = fma(least[2 + i % 2], sums[2 * M + column], acc[to + i])

    return multiply


def _dots(y, x, a, w, b, own):
    """Four sums of 32 products, each times its row's scale and rounded."""
    d = mma_s8(
        x[a], x[a + 1], x[a + 2], x[a + 3], w[b], w[b + 1], i32(MAGIC), i32(MAGIC), i32(MAGIC),
        i32(MAGIC),
    )  # fmt: skip
    y[0], y[1] = scaled(d[0], own[0], own[2]), scaled(d[1], own[1], own[3])
    y[2], y[3] = scaled(d[2], own[0], own[2]), scaled(d[3], own[1], own[3])


def _dots_of_halves(y, x, a, w, b, own):
    """The same of sums of 16 products, each times its whole scale; the sum of both is exact."""
    d = mma_s8_half(
        x[a], x[a + 1], w[b], i32(MAGIC), i32(MAGIC), i32(MAGIC), i32(MAGIC)
    )  # fmt: skip
    e = mma_s8_half(
        x[a + 2], x[a + 3], w[b + 1], i32(MAGIC), i32(MAGIC), i32(MAGIC), i32(MAGIC)
    )  # fmt: skip
    y[0] = own[0] * (scaled(d[0], own[2], own[8]) + scaled(e[0], own[4], own[10]))
    y[1] = own[1] * (scaled(d[1], own[3], own[9]) + scaled(e[1], own[5], own[11]))
    y[2] = own[0] * (scaled(d[2], own[2], own[8]) + scaled(e[2], own[4], own[10]))
    y[3] = own[1] * (scaled(d[3], own[3], own[9]) + scaled(e[3], own[5], own[11]))


def scaled(bits, y, offset):
    """y x sum, rounded once, where `bits` is MAGIC + sum and `offset` -1.5 x 2^23 y."""
    return fma(bits_to_f32(u32(bits)), y, offset)
