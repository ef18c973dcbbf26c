"""Rows of float32 to blocks with plain scales. Parallel over groups of 16 blocks.

Without an importance the bytes are those of ggml on x86-64, where products and sums round apart;
with one, scales are searched for (see fit.py), but for Q8_0 and Q1_0. All kernels are called alike:
x float32 [n_rows, n_columns], importance float32 [n_columns] or 0, out: the blocks of the rows,
behind one another.
"""

from __future__ import annotations

from runtime.ops.blocks import BLOCK_FORMATS

from . import lanes as l
from . import simd as s
from .fit import Parts, Starts, alone_centred, alone_ranged, signed_peak
from .packing import packer
from .rows import helper, share

_bases, BLOCK = l.room(4 * 64), 32


def kernel(name, exact, search=None):
    """Both (values, weights, bases): codes to the place of values, and the fields of the scale.

    search: for rows with an importance; `exact` is given no weights.
    """
    row, pack, search = BLOCK_FORMATS[name], packer(name), search or exact
    size, nbytes = row.block, row.nbytes
    values_room, weights_room = l.room(64 * size), l.room(64 * size)
    read, read_row = l.loader(size), l.loader(size, periodic=True)

    def quantise(x, importance, out, n_rows, n_columns, thread, n_threads):
        values, weights, bases = values_room(), weights_room(), _bases()
        blocks = n_rows * (n_columns // size)
        first, last = share((blocks + 15) // 16, thread, n_threads)
        for block in range(16 * first, min(16 * last, blocks), 16):
            read(x, block, blocks, values, n_columns)
            if importance == 0:
                exact(values, weights, bases)
            else:
                read_row(importance, block, blocks, weights, n_columns)
                search(values, weights, bases)
            pack(values, 0, 0, bases, out + nbytes * block, min(16, blocks - block))

    return quantise


def _centred(n):
    """d = x / -n of the x of largest magnitude, which so has code 0."""
    middle, top = n + 0.5, 2 * n - 1

    @helper
    def exact(values, weights, bases):
        d = signed_peak(values, BLOCK) / s.splat(s.f32(-n))
        inverse = l.inverse(d)
        for j in range(BLOCK):
            code = s.load(values + 64 * j) * inverse + s.splat(s.f32(middle))
            code = l.truncated(s.smaller(code, s.splat(s.f32(top))))
            l.store_ints(values + 64 * j, code)
        l.store_ints(bases, l.half_bits(d))

    return exact


def _searched(n):
    return alone_centred(Parts(1, BLOCK, (-n, n - 1)), Starts(2.25, -0.25, 16))


def _from_minimum(top):
    """d = (max - min) / top."""

    @helper
    def exact(values, weights, bases):
        low = high = s.load(values)
        for j in range(1, BLOCK):
            x = s.load(values + 64 * j)
            low, high = s.smaller(x, low), s.larger(x, high)
        d = (high - low) / s.splat(s.f32(top))
        inverse = l.inverse(d)
        for j in range(BLOCK):
            code = (s.load(values + 64 * j) - low) * inverse + s.splat(s.f32(0.5))
            code = l.truncated(s.smaller(code, s.splat(s.f32(top))))
            l.store_ints(values + 64 * j, code)
        l.store_ints(bases, l.half_bits(d))
        l.store_ints(bases + 64, l.half_bits(low))

    return exact


def _ranged(top):
    return alone_ranged(Parts(1, BLOCK, (0, top)), Starts(top + 2.5, -0.5, 10), 0.45 / top)


def build_quantise_q1_0():
    """The sign of each of 128, and the scale that is best for signs: the mean magnitude."""

    @helper
    def exact(values, weights, bases):
        total = s.splat(s.f32(0))
        for j in range(0, 128 * 64, 64):
            x = s.load(values + j)
            total = total + l.absolute(x)
            positive = x >= s.splat(s.f32(0))
            l.store_ints(values + j, s.select_ints(positive, s.splat_int(1), s.splat_int(0)))
        l.store_ints(bases, l.half_bits(total / s.splat(s.f32(128))))

    return kernel("q1_0", exact)


@helper
def _q8_0(values, weights, bases):
    """d = max|x| / 127; halves away from zero."""
    d = l.absolute(signed_peak(values, BLOCK)) / s.splat(s.f32(127))
    inverse = l.inverse(d)
    for j in range(BLOCK):
        l.store_ints(values + 64 * j, l.half_away(s.load(values + 64 * j) * inverse))
    l.store_ints(bases, l.half_bits(d))


def build_quantise_q4_0():
    """See `_centred`."""
    return kernel("q4_0", _centred(8), _searched(8))


def build_quantise_q5_0():
    """See `_centred`."""
    return kernel("q5_0", _centred(16), _searched(16))


def build_quantise_q4_1():
    """See `_from_minimum`."""
    return kernel("q4_1", _from_minimum(15), _ranged(15))


def build_quantise_q5_1():
    """See `_from_minimum`."""
    return kernel("q5_1", _from_minimum(31), _ranged(31))


def build_quantise_q8_0():
    """See `_q8_0`."""
    return kernel("q8_0", _q8_0)


def build_quantise_q2_0():
    """Codes -1 to 2 of 64: the one type here that is searched for without an importance too."""
    search = alone_centred(Parts(1, 64, (-1, 2)), Starts(1.9, -0.2, 14))

    @helper
    def alike(values, weights, bases):
        for j in range(0, 64 * 64, 64):
            s.store(weights + j, s.splat(s.f32(1)))
        search(values, weights, bases)

    return kernel("q2_0", alike, search)
