"""Rows of float32 to blocks of E2M1 floats with a float of a byte for scale.

Bytes are those of ggml; with an importance, MXFP4 takes the best of three scales.
"""

from __future__ import annotations

from itertools import pairwise

from runtime.ops.blocks import E2M1_LEVELS

from . import lanes as l
from . import simd as s
from .fit import signed_peak
from .quantise_small import kernel
from .rows import helper

LEVELS = tuple(float(level) for level in E2M1_LEVELS[:8])
MIDDLES = tuple((x + y) / 2 for x, y in pairwise(LEVELS))
# log2 of the largest floats below a power of two rounds up to a whole number: 44 of them where the
# result is 64 or more, half as many for each power less (1 where it is 2 or 3)
_ROUNDED_UP = ((2, 1), (4, 2), (8, 5), (16, 11), (32, 22), (64, 44))


@helper
def _code(x, d):
    """Of 8 levels times d the nearest to |x|, the lower of two; d above 0."""
    code, size = s.splat_int(0), l.absolute(x)
    for i in range(7):
        more = size > d * s.splat(s.f32(MIDDLES[i]))
        code = s.select_ints(more, s.splat_int(i + 1), code)
    return code


@helper
def _put_codes(values, n, d):
    """Codes of n elements, 8 more for negative ones; 0 where d is 0."""
    zero = s.splat(s.f32(0))
    for j in range(0, 64 * n, 64):
        x = s.load(values + j)
        code = s.select_ints(d > zero, _code(x, d), s.splat_int(0))
        minus = (x < zero) & (code > s.splat_int(0))
        l.store_ints(values + j, s.select_ints(minus, code + s.splat_int(8), code))


@helper
def _error(values, weights, d):
    total = s.splat(s.f32(0))
    for j in range(0, 32 * 64, 64):
        x = s.load(values + j)
        code, level = _code(x, d), s.splat(s.f32(0))
        for i in range(1, 8):
            level = s.select(code == s.splat_int(i), s.splat(s.f32(LEVELS[i])), level)
        left = l.absolute(x) - level * d
        total = s.fma(s.load(weights + j) * left, left, total)
    return total


@helper
def _exponent(values):
    """Biased, of the scale of the largest value's power of two."""
    bits = l.bits_of(l.absolute(signed_peak(values, 32)))
    power = l.dropped(bits, 23) - s.splat_int(127)
    below = s.select_ints(power < s.splat_int(0), s.splat_int(-1) - power, power)
    up = s.splat_int(0)
    for i in range(6):
        least, count = _ROUNDED_UP[i]
        up = s.select_ints(below >= s.splat_int(least), s.splat_int(count), up)
    exponent = l.dropped(bits + up, 23) - s.splat_int(2)
    return s.select_ints(exponent > s.splat_int(0), exponent, s.splat_int(0))


@helper
def _power(exponent):
    """2^(exponent - 128): half the scale, for levels are doubled."""
    return l.floats_of(l.shifted(exponent + s.splat_int(1), 23)) * s.splat(s.f32(0.25))


@helper
def _mxfp4(values, weights, bases):
    exponent = _exponent(values)
    l.store_ints(bases, exponent)
    _put_codes(values, 32, _power(exponent))


@helper
def _mxfp4_searched(values, weights, bases):
    middle = best = _exponent(values)
    least = s.splat(s.f32(3e38))
    for k in range(-1, 2):
        exponent = middle + s.splat_int(k)
        exponent = s.select_ints(exponent > s.splat_int(0), exponent, s.splat_int(0))
        off = _error(values, weights, _power(exponent))
        better = off < least
        least, best = s.select(better, off, least), s.select_ints(better, exponent, best)
    l.store_ints(bases, best)
    _put_codes(values, 32, _power(best))


def build_quantise_mxfp4():
    """Scales are powers of two."""
    return kernel("mxfp4", _mxfp4, _mxfp4_searched)


@helper
def _ue4m3(x):
    """Unsigned E4M3 of x, halves up, at most 448; its value by `_ue4m3_value`."""
    bits = l.bits_of(s.smaller(x, s.splat(s.f32(448))))
    code = l.dropped(bits + s.splat_int(1 << 19), 20) - s.splat_int(120 * 8)
    small = l.truncated(x * s.splat(s.f32(512)) + s.splat(s.f32(0.5)))
    small = s.select_ints(small > s.splat_int(7), s.splat_int(7), small)
    code = s.select_ints(x < s.splat(s.f32(1 / 64)), small, code)
    return s.select_ints(code > s.splat_int(0x7E), s.splat_int(0x7E), code)


@helper
def _ue4m3_value(code):
    small = l.floats(code) * s.splat(s.f32(1 / 512))
    value = l.floats_of(l.shifted(code + s.splat_int(120 * 8), 20))
    return s.select(code < s.splat_int(8), small, value)


@helper
def _nvfp4(values, weights, bases):
    for part in range(4):
        at = values + part * 16 * 64
        code = _ue4m3(l.absolute(signed_peak(at, 16)) / s.splat(s.f32(6)))
        l.store_ints(bases + 64 * part, code)
        _put_codes(at, 16, _ue4m3_value(code) * s.splat(s.f32(0.5)))


def build_quantise_nvfp4():
    """A scale for each 16 of 64."""
    return kernel("nvfp4", _nvfp4)
