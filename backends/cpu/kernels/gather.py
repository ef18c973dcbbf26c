"""Rows picked by number: embedding rows decoded from the file's blocks, and activation rows.

Parallel over (row x block), so that one token's row is shared too. Decoders are scalar: a step
reads one row per token. Block layouts are the C structs of ggml-common.h; every value is computed
as the format's reference does, in float32, product before sum.
"""

from __future__ import annotations

from runtime.backends.plan.catalogue import constants

from . import gather_blocks as blocks
from . import simd as s
from .gather_books import book_block
from .gather_values import f16_at, iq4_value, put
from .rows import helper, share


@helper
def f32_block(at, out):
    put(out, 0, s.load_f32(at))


@helper
def f16_block(at, out):
    put(out, 0, f16_at(at))


@helper
def bf16_block(at, out):
    put(out, 0, s.float_of(s.load_u16(at) << 16))


@helper
def q8_0_block(at, out):
    d = f16_at(at)
    for i in range(32):
        put(out, i, d * s.f32(s.load_i8(at + 2 + i)))


@helper
def q4_0_block(at, out):
    d = f16_at(at)
    for i in range(16):
        byte = s.load_u8(at + 2 + i)
        put(out, i, d * s.f32((byte & 15) - 8))
        put(out, i + 16, d * s.f32((byte >> 4) - 8))


@helper
def q4_1_block(at, out):
    d, m = f16_at(at), f16_at(at + 2)
    for i in range(16):
        byte = s.load_u8(at + 4 + i)
        put(out, i, d * s.f32(byte & 15) + m)
        put(out, i + 16, d * s.f32(byte >> 4) + m)


@helper
def fifth_bits(address, i):
    """Bits 4 of elements i and i + 16, in place, from a word of 32 of them."""
    word = s.load_i32(address)
    return (word >> i & 1) << 4, (word >> (i + 16) & 1) << 4


@helper
def q5_0_block(at, out):
    d = f16_at(at)
    for i in range(16):
        byte = s.load_u8(at + 6 + i)
        low, high = fifth_bits(at + 2, i)
        put(out, i, d * s.f32((byte & 15 | low) - 16))
        put(out, i + 16, d * s.f32((byte >> 4 | high) - 16))


@helper
def q5_1_block(at, out):
    d, m = f16_at(at), f16_at(at + 2)
    for i in range(16):
        byte = s.load_u8(at + 8 + i)
        low, high = fifth_bits(at + 4, i)
        put(out, i, d * s.f32(byte & 15 | low) + m)
        put(out, i + 16, d * s.f32(byte >> 4 | high) + m)


@helper
def iq4_nl_block(at, out):
    d = f16_at(at)
    for i in range(16):
        byte = s.load_u8(at + 2 + i)
        put(out, i, d * iq4_value(byte & 15))
        put(out, i + 16, d * iq4_value(byte >> 4))


@helper
def six_bits(scales, j):
    """Scale and minimum of group j of 8, six bits each, of a K format's 12 bytes."""
    if j < 4:
        scale = s.load_u8(scales + j) & 63
        low = s.load_u8(scales + j + 4) & 63
    else:
        shared = s.load_u8(scales + j + 4)
        scale = shared & 15 | s.load_u8(scales + j - 4) >> 6 << 4
        low = shared >> 4 | s.load_u8(scales + j) >> 6 << 4
    return s.f32(scale), s.f32(low)


@helper
def q4_k_block(at, out):
    d, dmin = f16_at(at), f16_at(at + 2)
    for j in range(8):
        scale, low = six_bits(at + 4, j)
        scale, low = d * scale, dmin * low
        for i in range(32):
            byte = s.load_u8(at + 16 + (j >> 1) * 32 + i)
            put(out, j * 32 + i, scale * s.f32(byte >> (j & 1) * 4 & 15) - low)


@helper
def q5_k_block(at, out):
    d, dmin = f16_at(at), f16_at(at + 2)
    for j in range(8):
        scale, low = six_bits(at + 4, j)
        scale, low = d * scale, dmin * low
        for i in range(32):
            byte = s.load_u8(at + 48 + (j >> 1) * 32 + i)
            fifth = (s.load_u8(at + 16 + i) >> j & 1) << 4
            put(out, j * 32 + i, scale * s.f32(byte >> (j & 1) * 4 & 15 | fifth) - low)


@helper
def q6_k_block(at, out):
    d = f16_at(at + 208)
    for j in range(8):  # 32 elements; two groups of 16 with a scale each
        half, quarter = j >> 2, j & 3
        for i in range(32):
            byte = s.load_u8(at + half * 64 + (quarter & 1) * 32 + i)
            top = s.load_u8(at + 128 + half * 32 + i) >> quarter * 2 & 3
            q = (byte >> (quarter >> 1) * 4 & 15 | top << 4) - 32
            scale = d * s.f32(s.load_i8(at + 192 + j * 2 + (i >> 4)))
            put(out, j * 32 + i, scale * s.f32(q))


# format -> decoder of one block, elements, bytes
_FORMATS = {
    "f32": (f32_block, 1, 4),
    "f16": (f16_block, 1, 2),
    "bf16": (bf16_block, 1, 2),
    "q8_0": (q8_0_block, 32, 34),
    "q4_0": (q4_0_block, 32, 18),
    "q4_1": (q4_1_block, 32, 20),
    "q5_0": (q5_0_block, 32, 22),
    "q5_1": (q5_1_block, 32, 24),
    "iq4_nl": (iq4_nl_block, 32, 18),
    "q4_k": (q4_k_block, 256, 144),
    "q5_k": (q5_k_block, 256, 176),
    "q6_k": (q6_k_block, 256, 210),
    "mxfp4": (blocks.mxfp4_block, 32, 17),
    "nvfp4": (blocks.nvfp4_block, 64, 36),
    "iq4_xs": (blocks.iq4_xs_block, 256, 136),
    "q2_k": (blocks.q2_k_block, 256, 84),
    "q3_k": (blocks.q3_k_block, 256, 110),
    "tq1_0": (blocks.tq1_0_block, 256, 54),
    "tq2_0": (blocks.tq2_0_block, 256, 66),
    "q1_0": (blocks.q1_0_block, 128, 18),
    "q2_0": (blocks.q2_0_block, 64, 18),
}
# The formats of code books have 256 elements: bytes.
_BOOKS = {"iq1_s": 50, "iq1_m": 56, "iq2_xxs": 66, "iq2_xs": 74, "iq2_s": 82}
_BOOKS |= {"iq3_xxs": 98, "iq3_s": 110}


@constants(format=(*_FORMATS, *_BOOKS))
def build_get_rows(format):
    if format in _BOOKS:
        decode, elements, nbytes = book_block(format), 256, _BOOKS[format]
    else:
        decode, elements, nbytes = _FORMATS[format]

    def get_rows(table, ids, out, live, n, row_bytes, out_stride, thread, n_threads):
        blocks = n // elements
        first, last = share(s.load_i64(live) * blocks, thread, n_threads)
        for item in range(first, last):
            row, block = item // blocks, item % blocks
            source = table + s.load_i32(ids + row * 4) * row_bytes + block * nbytes
            decode(source, out + (row * out_stride + block * elements) * 4)

    return get_rows


def build_gather_rows():
    def gather_rows(x, ids, out, live, n, x_stride, out_stride, thread, n_threads):
        whole = n // 16
        units = (n + 15) // 16
        first, last = share(s.load_i64(live) * units, thread, n_threads)
        for item in range(first, last):
            row, unit = item // units, item % units
            source = x + (s.load_i32(ids + row * 4) * x_stride + unit * 16) * 4
            target = out + (row * out_stride + unit * 16) * 4
            if unit < whole:
                s.store(target, s.load(source))
            else:
                part = n - whole * 16
                s.store_part(target, s.load_part(source, part, s.f32(0)), part)

    return gather_rows
