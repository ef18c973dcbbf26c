"""Products of weights in f16 or bf16 with float32 activations on tensor cores.

The numbers of an activation become pieces in the type of the weights, whose sum it is: of bf16
three, exactly; of f16 two, after a power of two has brought the largest of its block of 64 between
2^14 and 2^15, so that at most 2^-23 of a value is lost, or 2^-39 of the largest. See `layouts.py`
for the order of the sum.

A of an mma are 16 columns, B are 8 rows of weights. Lane 4 g + t holds eight values in a row, from
8 t on of 32, as four words: of row g, and of one piece of columns g and g + 8. Words 2 j and
2 j + 1 are what mma number j of the two takes as its lower and its upper half of k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from runtime.backends.cuda.intrinsic import Intrinsic
from runtime.backends.cuda.intrinsics import (
    bits_to_f32,
    f16_high,
    f16_low,
    f32_to_bits,
    fabs,
    fmax,
    load4,
    mma_bf16,
    mma_f16,
    pack_bf16,
    pack_f16,
    u32,
)  # fmt: skip

UNITS = 8  # of 8 values, in a block of 64


class Half(NamedTuple):
    """How activations are split for a format: into `pieces`; scaled: by a block's largest."""

    pieces: int
    scaled: bool
    multiply: Intrinsic
    split: Callable


def _split_f16(words, at, low, high, up):
    low, high = low * up, high * up
    word = pack_f16(low, high)
    words[at] = word
    words[at + 4] = pack_f16(low - f16_low(word), high - f16_high(word))


def _split_bf16(words, at, low, high, up):
    for piece in range(3):
        word = pack_bf16(low, high)
        words[at + 4 * piece] = word
        low = low - bits_to_f32(u32(word << 16))
        high = high - bits_to_f32(u32(word & 0xFFFF0000))


HALVES = {
    "F16": Half(2, True, mma_f16, _split_f16),
    "BF16": Half(3, False, mma_bf16, _split_bf16),
}


def splitter(format: str) -> Callable:
    """split(words, at, values, first, up): 8 values as 4 words of each piece, one after another."""
    pair = HALVES[format].split

    def split(words, at, values, first, up):
        for i in range(4):
            pair(words, at + i, values[first + 2 * i], values[first + 2 * i + 1], up)

    return split


def read_unit(values, at, x, piece):
    """8 values of a column, which begin at a piece of `x`."""
    a, b = load4(x, piece), load4(x, u32(piece + 1))
    for i in range(4):
        values[at + i], values[at + 4 + i] = a[i], b[i]


def peak_of(values, first, count):
    """The largest magnitude of `count` values."""
    peak = fabs(values[first])
    for i in range(1, count):
        peak = fmax(peak, fabs(values[first + i]))
    return peak


def _exponent(peak):
    return u32(max(u32(f32_to_bits(peak) >> 23), u32(15)))


def factor_of(peak):
    """The power of two that brings `peak` between 2^14 and 2^15, unless it is next to nothing."""
    return bits_to_f32(u32(u32(268 - _exponent(peak)) << 23))


def scale_of(peak):
    """Its inverse."""
    return bits_to_f32(u32(u32(_exponent(peak) - 14) << 23))
