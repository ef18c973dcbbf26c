"""Decoders of one block: the formats with few bits that need no code book.

Layouts and products as in `gather`, to whose table these belong.
"""

from __future__ import annotations

from . import simd as s
from .gather_values import e2m1_value, f16_at, iq4_value, put
from .rows import helper

_E4M3_UNIT = 2.0**119  # undoes the exponent of a float read from bits 20 on, and halves it


@helper
def mxfp4_block(at, out):
    e = s.load_u8(at)
    d = s.float_of((e - 1) << 23 if e > 1 else 0x00200000 << e)  # 2^(e - 128)
    for i in range(16):
        byte = s.load_u8(at + 1 + i)
        put(out, i, d * e2m1_value(byte & 15))
        put(out, i + 16, d * e2m1_value(byte >> 4))


@helper
def nvfp4_block(at, out):
    for j in range(4):
        bits = s.load_u8(at + j)
        bits = 0 if bits == 0x7F else bits & 0x7F
        d = s.float_of(bits << 20) * s.f32(_E4M3_UNIT)
        for i in range(8):
            byte = s.load_u8(at + 4 + j * 8 + i)
            put(out, j * 16 + i, d * e2m1_value(byte & 15))
            put(out, j * 16 + i + 8, d * e2m1_value(byte >> 4))


@helper
def iq4_xs_block(at, out):
    d = f16_at(at)
    for j in range(8):
        low = s.load_u8(at + 4 + (j >> 1)) >> (j & 1) * 4 & 15
        high = s.load_u16(at + 2) >> j * 2 & 3
        scale = d * s.f32((low | high << 4) - 32)
        for i in range(16):
            byte = s.load_u8(at + 8 + j * 16 + i)
            put(out, j * 32 + i, scale * iq4_value(byte & 15))
            put(out, j * 32 + i + 16, scale * iq4_value(byte >> 4))


@helper
def two_bits(quants, j, i):
    """Element i of group j of 16: 128 elements share 32 bytes, 32 of them a pair of bits."""
    return s.load_u8(quants + (j >> 3) * 32 + (j & 1) * 16 + i) >> (j >> 1 & 3) * 2 & 3


@helper
def q2_k_block(at, out):
    d, dmin = f16_at(at + 80), f16_at(at + 82)
    for j in range(16):
        both = s.load_u8(at + j)
        scale, low = d * s.f32(both & 15), dmin * s.f32(both >> 4)
        for i in range(16):
            put(out, j * 16 + i, scale * s.f32(two_bits(at + 16, j, i)) - low)


@helper
def q3_k_block(at, out):
    d = f16_at(at + 108)
    for j in range(16):
        low = s.load_u8(at + 96 + (j & 7)) >> (j >> 3) * 4 & 15
        high = s.load_u8(at + 104 + (j & 3)) >> (j >> 2) * 2 & 3
        scale = d * s.f32((low | high << 4) - 32)
        for i in range(16):
            third = s.load_u8(at + (j & 1) * 16 + i) >> (j >> 1) & 1
            put(out, j * 16 + i, scale * s.f32((two_bits(at + 32, j, i) | third << 2) - 4))


@helper
def tq2_0_block(at, out):
    d = f16_at(at + 64)
    for j in range(16):
        for i in range(16):
            put(out, j * 16 + i, d * s.f32(two_bits(at, j, i) - 1))


@helper
def q1_0_block(at, out):
    d = f16_at(at)
    for i in range(128):
        put(out, i, d * s.f32((s.load_u8(at + 2 + (i >> 3)) >> (i & 7) & 1) * 2 - 1))


@helper
def q2_0_block(at, out):
    d = f16_at(at)
    for i in range(64):
        put(out, i, d * s.f32((s.load_u8(at + 2 + (i >> 2)) >> (i & 3) * 2 & 3) - 1))


@helper
def digits(at, count, n, d, out):
    """Base-3 digits of n bytes, first digits of all bytes first: bytes are fractions of 256."""
    power = 1
    for j in range(count):
        for i in range(n):
            digit = (s.load_u8(at + i) * power & 255) * 3 >> 8
            put(out, j * n + i, d * s.f32(digit - 1))
        power *= 3


@helper
def tq1_0_block(at, out):
    d = f16_at(at + 52)
    digits(at, 5, 32, d, out)
    digits(at + 32, 5, 16, d, out + 160 * 4)
    digits(at + 48, 4, 4, d, out + 240 * 4)
