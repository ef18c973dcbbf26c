"""Decoders of one block of the code book formats; a book is a constant of the kernel.

`book_block(format)` is such a decoder. Layouts and products as in `gather`.
"""

from __future__ import annotations

import numpy as np

from runtime.ops.codebooks import code_book

from . import simd as s
from .gather_values import f16_at, put
from .rows import helper


@helper
def even_signs(seven):
    """Seven sign bits with the eighth that makes the number of minus signs even."""
    folded = seven ^ seven >> 4
    folded ^= folded >> 2
    folded ^= folded >> 1
    return seven | (folded & 1) << 7


def _book(name):
    return np.ascontiguousarray(code_book(name).astype(np.int8))


def _signed_group(name):
    """A helper that writes one entry of a book: signs are bits, one for each element."""
    table, n = _book(name), code_book(name).shape[1]

    @helper
    def write(out, first, index, signs, scale):
        for i in range(n):
            level = s.f32(table[index, i])
            put(out, first + i, scale * (-level if signs >> i & 1 else level))

    return write


def _iq2_xxs():
    write = _signed_group("iq2_xxs")

    @helper
    def decode(at, out):
        d = f16_at(at)
        for j in range(8):
            rest = s.load_i32(at + 6 + j * 8)
            scale = d * (s.f32(rest >> 28 & 15) + s.f32(0.5)) * s.f32(0.25)
            for g in range(4):
                signs = even_signs(rest >> g * 7 & 127)
                write(out, j * 32 + g * 8, s.load_u8(at + 2 + j * 8 + g), signs, scale)

    return decode


@helper
def _group_scale(steps, k, d):
    """The scale of group k of 8: four bits of the bytes at `steps`, in quarters of d."""
    four = s.load_u8(steps + (k >> 2)) >> (k >> 1 & 1) * 4 & 15
    return d * (s.f32(four) + s.f32(0.5)) * s.f32(0.25)


def _iq2_xs():
    write = _signed_group("iq2_xs")

    @helper
    def decode(at, out):
        d = f16_at(at)
        for k in range(32):
            scale = _group_scale(at + 66, k, d)
            both = s.load_u16(at + 2 + k * 2)
            write(out, k * 8, both & 511, even_signs(both >> 9), scale)

    return decode


def _iq2_s():
    write = _signed_group("iq2_s")

    @helper
    def decode(at, out):
        d = f16_at(at)
        for k in range(32):
            scale = _group_scale(at + 74, k, d)
            high = s.load_u8(at + 66 + (k >> 2)) >> (k & 3) * 2 & 3
            write(out, k * 8, s.load_u8(at + 2 + k) | high << 8, s.load_u8(at + 34 + k), scale)

    return decode


def _iq3_xxs():
    write = _signed_group("iq3_xxs")

    @helper
    def decode(at, out):
        d = f16_at(at)
        for k in range(64):
            rest = s.load_i32(at + 66 + (k >> 3) * 4)
            scale = d * (s.f32(rest >> 28 & 15) + s.f32(0.5)) * s.f32(0.5)
            signs = even_signs(rest >> (k >> 1 & 3) * 7 & 127) >> (k & 1) * 4
            write(out, k * 4, s.load_u8(at + 2 + k), signs, scale)

    return decode


def _iq3_s():
    write = _signed_group("iq3_s")

    @helper
    def decode(at, out):
        d = f16_at(at)
        for k in range(64):
            steps = s.load_u8(at + 106 + (k >> 4)) >> (k >> 3 & 1) * 4 & 15
            scale = d * s.f32(1 + 2 * steps)
            high = s.load_u8(at + 66 + (k >> 3)) >> (k & 7) & 1
            signs = s.load_u8(at + 74 + (k >> 1)) >> (k & 1) * 4
            write(out, k * 4, s.load_u8(at + 2 + k) | high << 8, signs, scale)

    return decode


def _shifted_group():
    """A helper that writes one entry of the book of IQ1, an eighth up or down."""
    table = _book("iq1_s")

    @helper
    def write(out, first, index, down, scale):
        delta = s.f32(-0.125) if down else s.f32(0.125)
        for i in range(8):
            put(out, first + i, scale * (s.f32(table[index, i]) + delta))

    return write


def _iq1_s():
    write = _shifted_group()

    @helper
    def decode(at, out):
        d = f16_at(at)
        for k in range(32):
            high = s.load_u16(at + 34 + (k >> 2) * 2)
            scale = d * s.f32(2 * (high >> 12 & 7) + 1)
            index = s.load_u8(at + 2 + k) | (high >> (k & 3) * 3 & 7) << 8
            write(out, k * 8, index, high >> 15, scale)

    return decode


def _iq1_m():
    """The float16 is in the top bits of the four words that hold the scales."""
    write = _shifted_group()

    @helper
    def decode(at, out):
        bits = 0
        for i in range(4):
            bits |= s.load_u16(at + 48 + i * 2) >> 12 << i * 4
        d = s.half_of(bits)
        for k in range(32):
            steps = s.load_u16(at + 48 + (k >> 3) * 2) >> (k >> 1 & 3) * 3 & 7
            scale = d * s.f32(2 * steps + 1)
            high = s.load_u8(at + 32 + (k >> 1)) >> (k & 1) * 4
            write(out, k * 8, s.load_u8(at + k) | (high & 7) << 8, high >> 3 & 1, scale)

    return decode


_BLOCKS = {
    "iq1_s": _iq1_s,
    "iq1_m": _iq1_m,
    "iq2_xxs": _iq2_xxs,
    "iq2_xs": _iq2_xs,
    "iq2_s": _iq2_s,
    "iq3_xxs": _iq3_xxs,
    "iq3_s": _iq3_s,
}


def book_block(format):
    """The decoder (address of a block, address of 256 float32) of a code book format."""
    return _BLOCKS[format]()
