"""Blocks of 32 weights as signed bytes and float scales: what tensor cores and their epilogue take.

Of each format: `fetch` reads a block's numbers as they lie (`layouts.py`) into registers, codes
first, then HIGH, SCALES and SUPERS; `unpack` makes eight words of int8 of them; `scale` gives the
row's floats. A unit of all offsets is a word of 4 bytes, of `row` its words before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from runtime.backends.cuda.intrinsics import (
    constant,
    constant2,
    constant4,
    f16_high,
    f16_low,
    i32,
    int_to_f32,
    u32,
)  # fmt: skip
from runtime.backends.cuda.layouts import FORMATS
from runtime.ops.blocks import BLOCK_FORMATS

from .formats import half_e8m0, look_up_in, signed_byte_of

HIGH, SCALES, SUPERS = 8, 10, 11  # registers behind those of the codes
RAW = 12


class Form(NamedTuple):
    """How kernels read a format.

    halves: each half of a block has an integer scale of its own. minima: how many sums of the
    activations are subtracted: of the block, or of its halves. numbers: floats of a row's block,
    its scale, then the scales of its halves, then its minima.
    """

    fetch: Callable
    unpack: Callable
    scale: Callable
    halves: bool
    minima: int

    @property
    def numbers(self) -> int:
        """Scales and minima of a row that a stage has for each block."""
        return 1 + 2 * self.halves + self.minima


def form_of(format: str) -> Form:
    """How kernels read a packed format."""
    unpack, scale, halves, minima = _FORMS[format]
    return Form(_fetcher(format), unpack, scale, halves, minima)


def _fetcher(format: str) -> Callable:
    """raw: registers; row: the row's first word; place and block: of the block; see `layouts`."""
    sizes = {part.name: part.nbytes for part in FORMATS[format]}
    codes = {32: _sixteen_pairs, 16: _nibbles, 8: _pairs}[sizes["codes"]]
    high = {8: _high_pairs, 4: _high_word, 0: _no_high}[sizes.get("high", 0)]
    scale = {4: _scale_word, 2: _scale_half, 1: _scale_byte}[sizes["scales"]]
    supers = {4: _super_word, 2: _super_half, 0: _no_super}[sizes.get("supers", 0)]

    def fetch(raw, weights, row, place, block, places, high_at, scales_at, supers_at):
        codes(raw, weights, row, place, places)
        high(raw, weights, u32(row + high_at), place)
        raw[SCALES] = scale(weights, u32(row + scales_at), place)
        raw[SUPERS] = supers(weights, u32(row + supers_at), u32(block >> 3))

    return fetch


def _sixteen_pairs(raw, weights, row, place, places):
    a = constant4(weights, u32((row >> 2) + place))
    b = constant4(weights, u32(u32((row >> 2) + places) + place))
    raw[0], raw[1], raw[2], raw[3] = a[0], a[1], a[2], a[3]
    raw[4], raw[5], raw[6], raw[7] = b[0], b[1], b[2], b[3]


def _nibbles(raw, weights, row, place, places):
    a = constant4(weights, u32((row >> 2) + place))
    raw[0], raw[1], raw[2], raw[3] = a[0], a[1], a[2], a[3]


def _pairs(raw, weights, row, place, places):
    a = constant2(weights, u32((row >> 1) + place))
    raw[0], raw[1] = a[0], a[1]


def _high_pairs(raw, weights, at, place):
    a = constant2(weights, u32((at >> 1) + place))
    raw[HIGH], raw[HIGH + 1] = a[0], a[1]


def _high_word(raw, weights, at, place):
    raw[HIGH] = constant(weights, u32(at + place))


def _no_high(raw, weights, at, place):
    raw[HIGH] = u32(0)


def _scale_word(weights, at, place):
    return constant(weights, u32(at + place))


def _scale_half(weights, at, place):
    return u32(constant(weights, u32(at + (place >> 1))) >> u32((place & 1) << 4))


def _scale_byte(weights, at, place):
    return u32(constant(weights, u32(at + (place >> 2))) >> u32((place & 3) << 3))


_super_word, _super_half = _scale_word, _scale_half


def _no_super(weights, at, place):
    return u32(0)


# Eight words of int8: the first half of a block, then the second


def _bytes(raw, words):
    for w in range(8):
        words[w] = raw[w]


def _unsigned_nibbles(raw, words):
    for w in range(4):
        words[w], words[w + 4] = u32(raw[w] & 0x0F0F0F0F), u32((raw[w] >> 4) & 0x0F0F0F0F)


def _with_fifth_bits(raw, words):
    _unsigned_nibbles(raw, words)
    for w in range(8):
        words[w] = u32(words[w] | u32(u32((raw[HIGH] >> w) & 0x01010101) << 4))


def _with_high_pairs(raw, words):
    _unsigned_nibbles(raw, words)
    for w in range(4):
        for h in range(2):
            pair = u32(u32((raw[HIGH + h] >> (2 * w)) & 0x03030303) << 4)
            words[4 * h + w] = u32(words[4 * h + w] | pair)


def _two_bits(raw, words):
    for w in range(4):
        words[w], words[w + 4] = (
            u32((raw[0] >> (2 * w)) & 0x03030303), u32((raw[1] >> (2 * w)) & 0x03030303)
        )  # fmt: skip


def _three_bits(raw, words):
    _two_bits(raw, words)
    for w in range(8):
        words[w] = u32(words[w] | u32(u32((raw[HIGH] >> w) & 0x01010101) << 2))


def _signed(codes: Callable, bits: int) -> Callable:
    """Codes of `bits` bits less half their range: the sign bit is turned and spread upwards."""
    sign = 0x01010101 << (bits - 1)
    spread = (0x100 - (1 << bits)) >> (bits - 1)

    def unpack(raw, words):
        codes(raw, words)
        for w in range(8):
            m = u32(words[w] ^ sign)
            words[w] = u32(m | u32(u32(m & sign) * spread))

    return unpack


def _levels(name: str) -> Callable:
    """A word holds a selector of four values of each half: codes into a table of 16 bytes."""
    four = look_up_in(BLOCK_FORMATS[name].levels)

    def unpack(raw, words):
        for w in range(4):
            words[w], words[w + 4] = four(u32(raw[w] & 0xFFFF)), four(u32(raw[w] >> 16))

    return unpack


# The floats of a row's block: scales of halves are whole numbers


def _number(word):
    """A small unsigned integer."""
    return int_to_f32(i32(word))


def _f16(raw, numbers):
    numbers[0] = f16_low(raw[SCALES])


def _two_f16(raw, numbers):
    numbers[0], numbers[1] = f16_low(raw[SCALES]), -f16_high(raw[SCALES])


def _scale_and_minimum(raw, numbers):
    scale, minimum = _number(u32(raw[SCALES] & 0xFF)), _number(u32((raw[SCALES] >> 8) & 0xFF))
    numbers[0] = f16_low(raw[SUPERS]) * scale
    numbers[1] = f16_high(raw[SUPERS]) * minimum


def _of_halves(raw, numbers):
    numbers[0] = f16_low(raw[SUPERS])
    numbers[1] = int_to_f32(signed_byte_of(raw[SCALES], 0))
    numbers[2] = int_to_f32(signed_byte_of(raw[SCALES], 1))


def _all_of_halves(raw, numbers):
    steps, least = raw[SCALES], f16_high(raw[SUPERS])
    numbers[0] = f16_low(raw[SUPERS])
    numbers[1], numbers[2] = _number(u32(steps & 15)), _number(u32((steps >> 8) & 15))
    numbers[3] = least * _number(u32((steps >> 4) & 15))
    numbers[4] = least * _number(u32((steps >> 12) & 15))


def _of_block(raw, numbers):
    numbers[0] = f16_low(raw[SUPERS]) * int_to_f32(signed_byte_of(raw[SCALES], 0))


def _exponent(raw, numbers):
    numbers[0] = half_e8m0(u32(raw[SCALES] & 0xFF))


# format -> unpack, scale, halves, minima
_FORMS: dict[str, tuple[Callable, Callable, bool, int]] = {
    "Q8_0": (_bytes, _f16, False, 0),
    "Q4_0": (_signed(_unsigned_nibbles, 4), _f16, False, 0),
    "Q4_1": (_unsigned_nibbles, _two_f16, False, 1),
    "Q5_0": (_signed(_with_fifth_bits, 5), _f16, False, 0),
    "Q5_1": (_with_fifth_bits, _two_f16, False, 1),
    "Q2_K": (_two_bits, _all_of_halves, True, 2),
    "Q3_K": (_signed(_three_bits, 3), _of_halves, True, 0),
    "Q4_K": (_unsigned_nibbles, _scale_and_minimum, False, 1),
    "Q5_K": (_with_fifth_bits, _scale_and_minimum, False, 1),
    "Q6_K": (_signed(_with_high_pairs, 6), _of_halves, True, 0),
    "IQ4_NL": (_levels("iq4_nl"), _f16, False, 0),
    "IQ4_XS": (_levels("iq4_xs"), _of_block, False, 0),
    "MXFP4": (_levels("mxfp4"), _exponent, False, 0),
}
assert _FORMS.keys() == FORMATS.keys()
