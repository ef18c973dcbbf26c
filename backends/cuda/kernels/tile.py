"""Quantised weights times many columns of int8 activations on int8 tensor cores: prompts.

A block of 8 warps computes 128 columns x 128 rows of the output, each warp 64 x 32 in 16 matrices
of 16 x 8. The k axis goes by in stages of 2 blocks of 32 values, copied asynchronously two stages
ahead. A product of 32 values is one exact mma.m16n8k32; scales are applied to it in float32:

    the accumulator starts at MAGIC, the bits of 1.5 x 2^23, plus what the format adds to every
    product, so its bits after the mma are the float 1.5 x 2^23 + sum. Times the row's scale y,
    which is a float16, less 1.5 x 2^23 y, which is exact then: one fma gives y x sum, a second
    one adds it times the column's scale.

Shared memory holds pieces of 16 bytes as [half, block, row], so that the 8 rows of an ldmatrix lie
side by side and in different banks; scales lie in the order in which lanes take them.
"""

from __future__ import annotations

from collections.abc import Callable

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    bits_to_f32,
    block_x,
    block_y,
    constant,
    copy_async16,
    copy_commit,
    copy_wait1,
    dp2a,
    dynamic_shared,
    entry,
    f16_to_f32,
    f32,
    fma,
    i32,
    launch_next,
    launch_wait,
    ldmatrix_x4,
    load2,
    mma_s8,
    registers,
    shared_load4,
    store,
    store2,
    syncthreads,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.plan.catalogue import constants

TILE = 128  # columns, and rows, of a block of threads
BLOCKS = 2  # blocks of 32 values in a stage
STAGES = 3
THREADS = 256
MAGIC = 0x4B400000
MAGIC_F32 = f32(12582912)
A_STAGE = 2 * BLOCKS * TILE  # pieces of activations in a stage
SCALES = BLOCKS * TILE  # scales of one kind in a stage
_SIZES = {"Q8_0": 2, "Q4_0": 1}  # pieces of a block of weights


def _load_q8_0(words, tiles, rows, block):
    """Fragments of 4 x 8 rows: two of a row's halves per matrix."""
    lane = u32(thread_x() & 31)
    half, row = u32((lane >> 3) & 1), u32(rows + (lane & 7) + 8 * (lane >> 4))
    for pair in range(2):
        piece = u32(u32(half * BLOCKS + block) * TILE + row + 16 * pair)
        w = ldmatrix_x4(tiles, piece)
        words[4 * pair], words[4 * pair + 1] = w[0], w[1]
        words[4 * pair + 2], words[4 * pair + 3] = w[2], w[3]


def _load_q4_0(words, tiles, rows, block):
    """A word of nibbles is both halves of a fragment."""
    row = u32(rows + (thread_x() & 31))
    w = ldmatrix_x4(tiles, u32(u32(block * TILE) + row))
    words[0], words[1] = u32(w[0] & 0x0F0F0F0F), u32((w[0] >> 4) & 0x0F0F0F0F)
    words[2], words[3] = u32(w[1] & 0x0F0F0F0F), u32((w[1] >> 4) & 0x0F0F0F0F)
    words[4], words[5] = u32(w[2] & 0x0F0F0F0F), u32((w[2] >> 4) & 0x0F0F0F0F)
    words[6], words[7] = u32(w[3] & 0x0F0F0F0F), u32((w[3] >> 4) & 0x0F0F0F0F)


def _start_q8_0(sums):
    return i32(MAGIC)


def _start_q4_0(sums):
    """A nibble is 8 more than the value it stands for."""
    return dp2a(sums, u32(0x0808), i32(MAGIC))


_FORMATS = {"Q8_0": (_load_q8_0, _start_q8_0), "Q4_0": (_load_q4_0, _start_q4_0)}


def _copier(pieces: int) -> Callable:
    """Begin copying a stage of an operand whose blocks have `pieces` pieces."""

    def copy(tiles, target, source, first, rows, b, blocks):
        block, row = u32(thread_x() & 1), u32(thread_x() >> 1)
        place = u32(target + block * TILE + row)
        at, from_row, nbytes = u32(b + block), u32(first + row), u32(16)
        if from_row >= rows or at >= blocks:  # outside: zeros
            at, from_row, nbytes = u32(0), u32(0), u32(0)
        for half in range(pieces):
            origin = u32(u32(u32(from_row * pieces) + half) * blocks + at)
            copy_async16(tiles, u32(place + half * BLOCKS * TILE), source, origin, nbytes)

    return copy


def _fetcher(start: Callable) -> Callable:
    """The scales of a stage, one column and one row a thread; zero outside."""

    def fetch(meta, scales, column, columns, row, rows, b, blocks):
        at = u32(b + (thread_x() >> 7))
        x, begin, w = f32(0), u32(MAGIC), f32(0)
        if at < blocks and column < columns:
            bits, sums = load2(meta, u32(column * blocks + at))
            x, begin = bits_to_f32(bits), u32(start(sums))
        if at < blocks and row < rows:
            w = f16_to_f32(constant(scales, u32(row * blocks + at)))
        return x, begin, w

    return fetch


def keep_scales(tiles, numbers, base, x, begin, w):
    """Store what `fetch` found where lanes take it: 8 of their columns, 8 of their rows in turn.

    Columns as [block, 64s, column % 8, column / 8 % 8]; rows as [block, 32s, row / 2 % 4,
    row / 8 % 4, row % 2]. Starts of columns stand twice: four of them are an accumulator.
    """
    n, block = u32(thread_x() & 127), u32((thread_x() >> 7) * TILE)
    column = u32(u32(base + block + (n & 64)) + u32(8 * (n & 7) + ((n >> 3) & 7)))
    row = u32(u32(base + block + (n & 96)) + u32(8 * ((n >> 1) & 3) + 2 * ((n >> 3) & 3)))
    numbers[column] = x
    numbers[u32(row + (n & 1) + SCALES)] = w
    start = u32(2 * (column - base) + base + 2 * SCALES)
    tiles[start] = begin
    tiles[u32(start + 1)] = begin


def load_eight(array, at, target):
    """Eight scales beginning at `at`, a multiple of 8."""
    a, b = shared_load4(array, u32(at >> 2)), shared_load4(array, u32((at >> 2) + 1))
    target[0], target[1], target[2], target[3] = a[0], a[1], a[2], a[3]
    target[4], target[5], target[6], target[7] = b[0], b[1], b[2], b[3]


def _multiplier(load_weights: Callable) -> Callable:
    """One block of a stage: the warp's 16 products of 16 x 8, and their scales."""
    fragments, row_offsets = registers("u32", 8), registers("f32", 8)
    column_scales, row_scales = registers("f32", 8), registers("f32", 8)

    def multiply(acc, tiles, numbers, x_at, weights_at, scales_at, block):
        warp, lane = u32(thread_x() >> 5), u32(thread_x() & 31)
        columns, rows = u32(64 * (warp >> 2)), u32(32 * (warp & 3))
        weights, x, y, offset = fragments(), column_scales(), row_scales(), row_offsets()
        load_weights(weights, tiles, u32(weights_at + rows), block)
        base, mine = u32(scales_at + block * TILE), u32(columns + 8 * (lane >> 2))
        load_eight(numbers, u32(base + mine), x)
        load_eight(numbers, u32(base + SCALES + rows + 8 * (lane & 3)), y)
        for n in range(8):
            offset[n] = y[n] * -MAGIC_F32
        starts = u32(u32(base + block * TILE + 2 * SCALES + 2 * mine) >> 2)
        piece = u32(x_at + u32((lane >> 4) * BLOCKS + block) * TILE + columns + (lane & 15))
        for m in range(4):
            a, i = ldmatrix_x4(tiles, u32(piece + 16 * m)), shared_load4(tiles, u32(starts + m))
            for n in range(4):
                b, c = weights[2 * n], weights[2 * n + 1]
                d = mma_s8(
                    a[0], a[1], a[2], a[3], b, c, i32(i[0]), i32(i[1]), i32(i[2]), i32(i[3])
                )  # fmt: skip
                at, k = 16 * m + 4 * n, 2 * n + 1
                acc[at] = fma(scaled(d[0], y[2 * n], offset[2 * n]), x[2 * m], acc[at])
                acc[at + 1] = fma(scaled(d[1], y[k], offset[k]), x[2 * m], acc[at + 1])
                acc[at + 2] = fma(scaled(d[2], y[2 * n], offset[2 * n]), x[2 * m + 1], acc[at + 2])
                acc[at + 3] = fma(scaled(d[3], y[k], offset[k]), x[2 * m + 1], acc[at + 3])

    return multiply


def scaled(bits, y, offset):
    """y x sum, rounded once, where `bits` is MAGIC + sum and `offset` -1.5 x 2^23 y."""
    return fma(bits_to_f32(u32(bits)), y, offset)


def store_tile(acc, out, column, columns, row, rows, out_stride):
    """Two neighbouring rows of a column are one access."""
    warp, lane = u32(thread_x() >> 5), u32(thread_x() & 31)
    column = u32(u32(column + 64 * (warp >> 2)) + (lane >> 2))
    row = u32(u32(row + 32 * (warp & 3)) + 2 * (lane & 3))
    for m in range(8):
        for n in range(4):
            at = 16 * (m // 2) + 4 * n + 2 * (m % 2)
            c, r = u32(column + 8 * m), u32(row + 8 * n)
            place = u32(c * out_stride + r)
            if c < columns and u32(r + 1) < rows:
                store2(out, u32(place >> 1), acc[at], acc[at + 1])
            elif c < columns and r < rows:
                store(out, place, acc[at])


@constants(format=("Q8_0", "Q4_0"))
def build_tile(format: str) -> Declared:
    """out[c, row] = sum over k of weights[row, k] x[c, k]: `columns` columns, `rows` rows.

    Rows have `blocks` blocks of 32 values; `out` f32 [columns, out_stride], out_stride even.
    Grid (rows / 128, columns / 128), each rounded up.
    """
    PIECES = _SIZES[format]
    load_weights, start = _FORMATS[format]
    copy_x, copy_weights = _copier(2), _copier(PIECES)
    fetch, multiply = _fetcher(start), _multiplier(load_weights)
    shared_words, shared_numbers = dynamic_shared("u32"), dynamic_shared("f32")
    accumulators = registers("f32", 64)
    B_STAGE = PIECES * BLOCKS * TILE
    B = STAGES * A_STAGE
    NUMBERS = 4 * (B + STAGES * B_STAGE)

    @entry(
        "weights:u32* scales:u16* x:u32* meta:u32* out:f32* rows:u32 columns:u32 blocks:u32 "
        "out_stride:u32",
        threads=THREADS,
        shared_nbytes=4 * NUMBERS + STAGES * 16 * SCALES,
    )
    def tile(weights, scales, x, meta, out, rows, columns, blocks, out_stride):
        launch_next()
        tiles, numbers, acc = shared_words(), shared_numbers(), accumulators()
        row, column = u32(block_x() * TILE), u32(block_y() * TILE)
        my_row, my_column = u32(row + (thread_x() & 127)), u32(column + (thread_x() & 127))
        for n in range(64):
            acc[n] = f32(0)
        launch_wait()
        for s in range(STAGES - 1):
            b = u32(s * BLOCKS)
            copy_x(tiles, u32(s * A_STAGE), x, column, columns, b, blocks)
            copy_weights(tiles, u32(B + s * B_STAGE), weights, row, rows, b, blocks)
            copy_commit()
        f, i, w = fetch(meta, scales, my_column, columns, my_row, rows, u32(0), blocks)
        keep_scales(tiles, numbers, u32(NUMBERS), f, i, w)
        f, i, w = fetch(meta, scales, my_column, columns, my_row, rows, u32(BLOCKS), blocks)
        b, slot = u32(0), u32(0)
        while b < blocks:
            copy_wait1()
            syncthreads()
            after = u32(slot + 1) if slot < STAGES - 1 else u32(0)
            free = u32(after + 1) if after < STAGES - 1 else u32(0)
            keep_scales(tiles, numbers, u32(NUMBERS + after * 4 * SCALES), f, i, w)
            ahead = u32(b + (STAGES - 1) * BLOCKS)
            copy_x(tiles, u32(free * A_STAGE), x, column, columns, ahead, blocks)
            copy_weights(tiles, u32(B + free * B_STAGE), weights, row, rows, ahead, blocks)
            copy_commit()
            f, i, w = fetch(meta, scales, my_column, columns, my_row, rows, ahead, blocks)
            for block in range(BLOCKS):
                multiply(
                    acc, tiles, numbers, u32(slot * A_STAGE), u32(B + slot * B_STAGE),
                    u32(NUMBERS + slot * 4 * SCALES), u32(block),
                )  # fmt: skip
            b, slot = u32(b + BLOCKS), after
        store_tile(acc, out, column, columns, row, rows, out_stride)

    return tile
