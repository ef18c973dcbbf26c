"""Activations to int8, 32 values under one scale: 8 lanes take a block, 4 values each.

Alone (`quantize`), and at the end of kernels whose output only feeds quantised products.
Layout of x and meta: `layouts.py`; numbers are those of `layouts.quantize`, bit for bit.
"""

from __future__ import annotations

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    block_y,
    divide,
    entry,
    f32,
    f32_to_bits,
    fabs,
    fmax,
    i32,
    launch_next,
    launch_wait,
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


def sign_extended(word, shift):
    """The byte of a word that `shift` moves to the top, as int8 in an int32."""
    return i32(i32(u32(word << shift)) >> 24)


def pack_values(v, x, meta, column, i, blocks, live):
    """Store values 4 i .. 4 i + 3 of a column; all lanes of a warp must come, `live` ones store."""
    peak = fmax(fmax(fabs(v[0]), fabs(v[1])), fmax(fabs(v[2]), fabs(v[3])))
    peak = fmax(peak, shuffle_xor(peak, 4))
    peak = fmax(peak, shuffle_xor(peak, 2))
    peak = fmax(peak, shuffle_xor(peak, 1))
    scale = divide(peak, f32(127))
    inverse = f32(0)
    if scale > f32(0):
        inverse = divide(f32(1), scale)
    a, b, c, d = byte(v[0], inverse), byte(v[1], inverse), byte(v[2], inverse), byte(v[3], inverse)
    word = u32(u32(a | u32(b << 8)) | u32(u32(c << 16) | u32(d << 24)))
    total = i32(sign_extended(word, 24) + sign_extended(word, 16))
    total = i32(total + sign_extended(word, 8))
    negated = u32(-i32(total + sign_extended(word, 0)))
    negated = u32(negated + shuffle_xor_u32(negated, 1))
    negated = u32(negated + shuffle_xor_u32(negated, 2))
    second = shuffle_xor_u32(negated, 4)
    if live:
        block, part = u32(i >> 3), u32(i & 7)
        half = u32(u32(2 * column + (part >> 2)) * blocks + block)
        store(x, u32(4 * half + (part & 3)), word)
        if part == 0:
            sums = u32(u32(negated & 0xFFFF) | u32(second << 16))
            store2(meta, u32(column * blocks + block), f32_to_bits(scale), sums)


def build_quantize() -> Declared:
    """`x` f32 [columns, 32 blocks] to packed activations. Grid (blocks / 32, columns)."""

    @entry("x:f32* packed:u32* meta:u32* blocks:u32", threads=_THREADS)
    def quantize(x, packed, meta, blocks):
        launch_next()
        i, column = u32(block_x() * _THREADS + thread_x()), block_y()
        pieces = u32(8 * blocks)
        live = i < pieces
        launch_wait()
        v = load4(x, u32(column * pieces + min(i, u32(pieces - 1))))
        pack_values(v, packed, meta, column, i, blocks, live)

    return quantize
