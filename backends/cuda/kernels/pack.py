"""Activations to int8, 32 values under one scale: 8 lanes take a block, 4 values each.

Alone (`quantize`), and at the end of kernels whose output only feeds quantised products.
Layout: `layouts.py`; numbers are those of `layouts.quantize`, bit for bit.
"""

from __future__ import annotations

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    block_y,
    divide,
    dp4a,
    entry,
    f32,
    f32_to_bits,
    fabs,
    fmax,
    i32,
    launch_next,
    launch_wait,
    load,
    load4,
    round_i32,
    shuffle_xor,
    shuffle_xor_u32,
    store,
    store2,
    thread_x,
    u32,
)  # fmt: skip

_THREADS = 256


def byte(value, inverse):
    """The low 8 bits of the nearest integer to value x inverse."""
    return u32(round_i32(value * inverse) & 255)


def pack_values(v, x, column, i, stretches, length, live):
    """Store values 4 i .. 4 i + 3 of a column, which are zero behind its end.

    `stretches`, `length`: of the column's `cut`; i runs to 8 `stretches` `length`. All lanes of a
    warp must come, `live` ones store.
    """
    peak = fmax(fmax(fabs(v[0]), fabs(v[1])), fmax(fabs(v[2]), fabs(v[3])))
    peak = fmax(peak, shuffle_xor(peak, 4))
    peak = fmax(peak, shuffle_xor(peak, 2))
    peak = fmax(peak, shuffle_xor(peak, 1))
    scale = divide(peak, f32(127))
    inverse = f32(0)
    if scale > f32(0):
        inverse = divide(f32(1), scale)
    a, b, c, d = byte(v[0], inverse), byte(v[1], inverse), byte(v[2], inverse), byte(v[3], inverse)
    word = u32(a | b << 8 | c << 16 | d << 24)
    negated = u32(-dp4a(word, u32(0x01010101), i32(0)))
    negated = u32(negated + shuffle_xor_u32(negated, 1))
    negated = u32(negated + shuffle_xor_u32(negated, 2))
    second = shuffle_xor_u32(negated, 4)
    if live:
        part, places = u32(i & 7), u32(stretches * length)
        place, base = place_of(u32(i >> 3), stretches, length), u32(column * places)
        at = 4 * ((part >> 2) * places + place) + (part & 3)
        store(x, u32(10 * base + at), word)
        if part == 0:
            sums = u32((negated & 0xFFFF) | second << 16)
            store2(x, u32(5 * base + 4 * places + place), f32_to_bits(scale), sums)


def place_of(block, stretches, length):
    """Where a block of a row lies; see `layouts.py`."""
    stretch = u32(block // length)
    i = u32(block - u32(stretch * length))
    return u32(2 * ((i >> 1) * stretches + stretch) + (i & 1))


def build_quantize() -> Declared:
    """Rows of `n` values of `x` f32 to packed activations, a column each.

    Grid (stretches x length / 32, rows).
    """

    @entry("x:f32* packed:u32* n:u32 stride:u32 stretches:u32 length:u32", threads=_THREADS)
    def quantize(x, packed, n, stride, stretches, length):
        launch_next()
        i, column = u32(block_x() * _THREADS + thread_x()), block_y()
        live = i < u32(8 * u32(stretches * length))
        launch_wait()
        v = values_of(x, u32(column * stride), u32(4 * i), n)
        pack_values(v, packed, column, i, stretches, length, live)

    return quantize


def values_of(x, base, k, n):
    """Values k .. k + 3 of a row that begins at `base` and has `n`; zeros behind its end."""
    a, b, c, d = f32(0), f32(0), f32(0), f32(0)
    if u32(k + 3) < n and u32(u32(base + k) & 3) == 0:
        a, b, c, d = load4(x, u32(u32(base + k) >> 2))
    else:
        if k < n:
            a = load(x, u32(base + k))
        if u32(k + 1) < n:
            b = load(x, u32(u32(base + k) + 1))
        if u32(k + 2) < n:
            c = load(x, u32(u32(base + k) + 2))
        if u32(k + 3) < n:
            d = load(x, u32(u32(base + k) + 3))
    return a, b, c, d
