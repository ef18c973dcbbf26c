"""Q4_K and Q6_K times 1 to 8 columns of int8 activations; parallel as in `matvec.py`.

A block is 32 values here too: an eighth of the file's super-block, whose float scale is read by 8
lanes at once. Within it sums are exact integers times the small integer scales.
"""

from __future__ import annotations

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    bits_to_f32,
    block_x,
    constant,
    dp2a,
    dp4a_us,
    entry,
    f16_high,
    f16_low,
    f16_to_f32,
    f32,
    fma,
    i32,
    int_to_f32,
    launch_next,
    launch_wait,
    load2,
    load4,
    registers,
    shift_right,
    stream2,
    stream4,
    thread_x,
    u32,
)  # fmt: skip

from .sums import store_row_sums

WARPS = 4
THREADS = 32 * WARPS


def dot_nibbles(a, v, w, start):
    """start + the sum of 32 products: low nibbles of `a` with `v`, high ones with `w`; exact.

    High nibbles stay in place, 16 times too large, and so does their sum.
    """
    t = dp4a_us(u32(a[0] & 0x0F0F0F0F), v[0], start)
    h = dp4a_us(u32(a[0] & 0xF0F0F0F0), w[0], i32(0))
    t = dp4a_us(u32(a[1] & 0x0F0F0F0F), v[1], t)
    h = dp4a_us(u32(a[1] & 0xF0F0F0F0), w[1], h)
    t = dp4a_us(u32(a[2] & 0x0F0F0F0F), v[2], t)
    h = dp4a_us(u32(a[2] & 0xF0F0F0F0), w[2], h)
    t = dp4a_us(u32(a[3] & 0x0F0F0F0F), v[3], t)
    h = dp4a_us(u32(a[3] & 0xF0F0F0F0), w[3], h)
    return i32(t + shift_right(h, 4))


def dot_six_bits(a0, a1, a2, a3, high, v, start):
    """start + the sum of 16 products: four words of low nibbles, one of high pairs."""
    t = dp4a_us(u32((a0 & 0x0F0F0F0F) | (u32(high << 4) & 0x30303030)), v[0], start)
    t = dp4a_us(u32((a1 & 0x0F0F0F0F) | (u32(high << 2) & 0x30303030)), v[1], t)
    t = dp4a_us(u32((a2 & 0x0F0F0F0F) | (high & 0x30303030)), v[2], t)
    return dp4a_us(u32((a3 & 0x0F0F0F0F) | (u32(high >> 2) & 0x30303030)), v[3], t)


def low_byte(word):
    """Bits 0 to 7 of a word as int8, sign extended."""
    return i32(i32(u32(word << 24)) >> 24)


def high_byte(word):
    """Bits 8 to 15 of a word as int8, sign extended."""
    return i32(i32(u32(word << 16)) >> 24)


def matvec_k(format: str, rows: int, columns: int) -> Declared:
    """out[c, row] = sum over k of weights[row, k] x[c, k]; `blocks` of 32 values in a row."""
    return (_q4_k if format == "Q4_K" else _q6_k)(rows, columns)


def _q4_k(ROWS: int, COLUMNS: int) -> Declared:
    N = ROWS * COLUMNS
    accumulators, places = registers("f32", N), registers("u32", ROWS)
    finish = store_row_sums(WARPS, ROWS, COLUMNS)

    @entry(
        "weights:u32* scales:u16* supers:u32* x:u32* meta:u32* out:f32* n_rows:u32 blocks:u32 "
        "out_stride:u32",
        threads=THREADS,
        min_blocks=7 if N <= 8 else 4,
    )
    def matvec_q4_k(weights, scales, supers, x, meta, out, n_rows, blocks, out_stride):
        launch_next()
        acc, row = accumulators(), places()
        for r in range(ROWS):
            row[r] = u32(min(u32(block_x() * ROWS + r), u32(n_rows - 1)) * blocks)
        for n in range(N):
            acc[n] = f32(0)
        launch_wait()
        b = thread_x()
        while b < blocks:
            for c in range(COLUMNS):
                scale, sums = load2(meta, u32(c * blocks + b))
                cell = u32(2 * c * blocks + b)
                v, w = load4(x, cell), load4(x, u32(cell + blocks))
                total = int_to_f32(dp2a(sums, u32(0x0101), i32(0)))
                for r in range(ROWS):
                    at = u32(row[r] + b)
                    small, both = u32(constant(scales, at)), constant(supers, u32(at >> 3))
                    d = f16_low(both) * f32(u32(small & 0xFF))
                    m = f16_high(both) * f32(u32(small >> 8))
                    t = d * int_to_f32(dot_nibbles(stream4(weights, at), v, w, i32(0)))
                    acc[r * COLUMNS + c] += bits_to_f32(scale) * fma(m, total, t)
            b = u32(b + THREADS)
        finish(acc, out, u32(block_x() * ROWS), n_rows, out_stride)

    return matvec_q4_k


def _q6_k(ROWS: int, COLUMNS: int) -> Declared:
    N = ROWS * COLUMNS
    accumulators, places = registers("f32", N), registers("u32", ROWS)
    finish = store_row_sums(WARPS, ROWS, COLUMNS)

    @entry(
        "weights:u32* pairs:u32* scales:u16* supers:u16* x:u32* meta:u32* out:f32* n_rows:u32 "
        "blocks:u32 out_stride:u32",
        threads=THREADS,
        min_blocks=7 if N <= 8 else 4,
    )
    def matvec_q6_k(weights, pairs, scales, supers, x, meta, out, n_rows, blocks, out_stride):
        launch_next()
        acc, row = accumulators(), places()
        for r in range(ROWS):
            row[r] = u32(min(u32(block_x() * ROWS + r), u32(n_rows - 1)) * blocks)
        for n in range(N):
            acc[n] = f32(0)
        launch_wait()
        b = thread_x()
        while b < blocks:
            for c in range(COLUMNS):
                scale, sums = load2(meta, u32(c * blocks + b))
                cell = u32(2 * c * blocks + b)
                v, w = load4(x, cell), load4(x, u32(cell + blocks))
                first = dp2a(sums, u32(0x0020), i32(0))  # 32 less than each 6-bit value is meant
                second = dp2a(sums, u32(0x2000), i32(0))
                for r in range(ROWS):
                    at = u32(row[r] + b)
                    a, high = stream4(weights, at), stream2(pairs, at)
                    small = u32(constant(scales, at))
                    t = dot_six_bits(a[0], a[1], a[2], a[3], high[0], v, first)
                    h = dot_six_bits(
                        u32(a[0] >> 4), u32(a[1] >> 4), u32(a[2] >> 4), u32(a[3] >> 4), high[1], w,
                        second,
                    )  # fmt: skip
                    total = i32(i32(t * low_byte(small)) + i32(h * high_byte(small)))
                    d = f16_to_f32(constant(supers, u32(at >> 3))) * bits_to_f32(scale)
                    acc[r * COLUMNS + c] += d * int_to_f32(total)
            b = u32(b + THREADS)
        finish(acc, out, u32(block_x() * ROWS), n_rows, out_stride)

    return matvec_q6_k
