"""Rows of float32 to blocks of 32 with plain scales. Parallel over groups of 16 blocks.

Without an importance the bytes are ggml's. All are called alike: x float32 [n_rows, n_columns],
importance float32 [n_columns] or 0, out: the blocks of the rows, behind one another.
"""

from __future__ import annotations

from . import lanes as l
from . import simd as s
from .rows import helper, share

_read = l.loader(32)
_values, _codes = l.room(32 * 64), l.room(32 * 64)


@helper
def groups(n_rows, n_columns, thread, n_threads):
    """Blocks of 32, and the first and the end of those of a thread, in groups of 16."""
    blocks = n_rows * (n_columns // 32)
    first, last = share((blocks + 15) // 16, thread, n_threads)
    return blocks, first * 16, min(last * 16, blocks)


@helper
def signed_peak(values):
    """Of each block the element of the largest magnitude, the first of several."""
    peak = largest = s.splat(s.f32(0))
    for j in range(32):
        x = s.load(values + 64 * j)
        more = l.absolute(x) > largest
        peak, largest = s.select(more, x, peak), s.select(more, l.absolute(x), largest)
    return peak


@helper
def put_bytes(codes, out, stride, n):
    """A byte for each code."""
    for word in range(8):
        value = l.load_ints(codes + 256 * word) & s.splat_int(255)
        for i in range(1, 4):
            code = l.load_ints(codes + 256 * word + 64 * i) & s.splat_int(255)
            value = value | l.shifted(code, 8 * i)
        l.scatter_words(out + 4 * word, value, stride, n)


@helper
def put_nibbles(codes, out, stride, n):
    """Code j in the low and code j + 16 in the high half of a byte."""
    for word in range(4):
        value = s.splat_int(0)
        for i in range(4):
            at = codes + 256 * word + 64 * i
            low, high = l.load_ints(at), l.load_ints(at + 16 * 64)
            low, high = low & s.splat_int(15), l.shifted(high & s.splat_int(15), 4)
            value = value | l.shifted(low | high, 8 * i)
        l.scatter_words(out + 4 * word, value, stride, n)


def build_quantise_q8_0():
    """d = max|x| / 127, codes to the nearest, halves away from zero."""

    def quantise_q8_0(x, importance, out, n_rows, n_columns, thread, n_threads):
        values, codes = _values(), _codes()
        blocks, first, last = groups(n_rows, n_columns, thread, n_threads)
        for block in range(first, last, 16):
            _read(x, block, blocks, values, n_columns)
            d = l.absolute(signed_peak(values)) / s.splat(s.f32(127))
            inverse = l.inverse(d)
            for j in range(32):
                l.store_ints(codes + 64 * j, l.half_away(s.load(values + 64 * j) * inverse))
            at, n = out + 34 * block, last - block
            l.scatter_halves(at, l.half_bits(d), 34, n)
            put_bytes(codes, at + 2, 34, n)

    return quantise_q8_0


def build_quantise_q4_0():
    """d = x / -8 of the x of largest magnitude; codes to the nearest, at most 15."""

    def quantise_q4_0(x, importance, out, n_rows, n_columns, thread, n_threads):
        values, codes = _values(), _codes()
        blocks, first, last = groups(n_rows, n_columns, thread, n_threads)
        for block in range(first, last, 16):
            _read(x, block, blocks, values, n_columns)
            d = signed_peak(values) / s.splat(s.f32(-8))
            inverse = l.inverse(d)
            for j in range(32):
                code = s.load(values + 64 * j) * inverse + s.splat(s.f32(8.5))
                l.store_ints(codes + 64 * j, l.truncated(s.smaller(code, s.splat(s.f32(15)))))
            at, n = out + 18 * block, last - block
            l.scatter_halves(at, l.half_bits(d), 18, n)
            put_nibbles(codes, at + 2, 18, n)

    return quantise_q4_0
