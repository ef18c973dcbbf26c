"""Rotary position embedding (Su et al. 2021): angles once per step, rotation per layer.

Angles are taken in float64: at position 100,000 a float32 product is off by 0.004 radians. Parallel
over (token x pair) and over (token x head).
"""

from __future__ import annotations

from llvmlite import ir
from numba import types

from runtime.backends.plan.catalogue import constants

from . import emit as e
from . import simd as s
from .rows import helper, share

_ROUND = 6755399441055744.0  # 1.5 * 2^52: adding it leaves the nearest integer
_TWO_OVER_PI = 0.6366197723675814
# pi/2 in three parts of 33 bits: k times the first two is exact for k < 2^20 (Cody and Waite).
_HALF_PI = (1.5707963267341256, 6.077100506303966e-11, 2.0222662487959506e-21)


def _taylor(first):
    """1/first! -1/(first+2)! ... as a polynomial in x^2, highest power first, to x^17."""
    terms, value = [], 1.0
    for n in range(1, 18):
        value /= n
        if n >= first and (n - first) % 2 == 0:
            terms.append(-value if (n - first) // 2 % 2 else value)
    return terms[::-1]


_SIN, _COS = _taylor(1), _taylor(2)


@s.operation(types.float64, types.float64, types.boolean)
def polynomial(b, square, is_sine):
    """Of sin(r)/r, or of (1 - cos(r))/r^2, in r^2."""
    sine, cosine = ([ir.Constant(e.f64, c) for c in terms] for terms in (_SIN, _COS))
    if len(cosine) < len(sine):
        cosine = [ir.Constant(e.f64, 0.0), *cosine]
    value = b.select(is_sine, sine[0], cosine[0])
    for one, other in zip(sine[1:], cosine[1:], strict=True):
        value = b.fadd(b.fmul(value, square), b.select(is_sine, one, other))
    return value


@helper
def sine_cosine(angle):
    """sin and cos of a float64 of magnitude up to 1e6, each within 1e-15."""
    k = (angle * _TWO_OVER_PI + _ROUND) - _ROUND
    r = ((angle - k * _HALF_PI[0]) - k * _HALF_PI[1]) - k * _HALF_PI[2]
    sine = r * polynomial(r * r, True)
    cosine = 1.0 - r * r * polynomial(r * r, False)
    quarter = s.i64(k) & 3
    if quarter & 1 != 0:
        sine, cosine = cosine, sine
    if quarter == 1 or quarter == 2:
        cosine = -cosine
    if quarter >= 2:
        sine = -sine
    return sine, cosine


def build_rope_angles():
    """(cos, sin) * mscale of position * inv_freq, [tokens, half, 2]: parallel over both."""

    def rope_angles(
        positions, width, components, inv_freq, out, live, half, mscale, thread, n_threads
    ):
        size = types.float64(s.float_of(mscale))
        first, last = share(s.load_i64(live) * half, thread, n_threads)
        for item in range(first, last):
            row, i = item // half, item % half
            at = row * width
            if components != 0:
                at += s.load_i32(components + i * 4)
            position = types.float64(s.load_i32(positions + at * 4))
            angle = position * types.float64(s.load_f32(inv_freq + i * 4))
            sine, cosine = sine_cosine(angle)
            s.store_f32(out + item * 8, s.f32(cosine * size))
            s.store_f32(out + item * 8 + 4, s.f32(sine * size))

    return rope_angles


def _picked(start):
    pattern = list(range(start, 2 * e.LANES, 2))

    def emit(b, low, high):
        return b.shuffle_vector(low, high, ir.Constant(e.wide(e.i32), pattern))

    return s.operation(s.f32x16, s.f32x16, s.f32x16)(emit)


def _zipped(start):
    pairs = [(start + i, e.LANES + start + i) for i in range(e.LANES // 2)]
    pattern = [lane for pair in pairs for lane in pair]

    def emit(b, low, high):
        return b.shuffle_vector(low, high, ir.Constant(e.wide(e.i32), pattern))

    return s.operation(s.f32x16, s.f32x16, s.f32x16)(emit)


# Pairs in memory (a0 b0 a1 b1 ...) as 16 a and 16 b, and back.
evens, odds = _picked(0), _picked(1)
zip_low, zip_high = _zipped(0), _zipped(e.LANES // 2)


@helper
def rotate_neox(x, angles, out, half):
    """Pairs (i, i + half)."""
    whole = half // 16 * 16
    for i in range(0, whole, 16):
        low, high = s.load(angles + i * 8), s.load(angles + i * 8 + 64)
        cosine, sine = evens(low, high), odds(low, high)
        a, b = s.load(x + i * 4), s.load(x + (i + half) * 4)
        s.store(out + i * 4, a * cosine - b * sine)
        s.store(out + (i + half) * 4, a * sine + b * cosine)
    for i in range(whole, half):
        cosine, sine = s.load_f32(angles + i * 8), s.load_f32(angles + i * 8 + 4)
        a, b = s.load_f32(x + i * 4), s.load_f32(x + (i + half) * 4)
        s.store_f32(out + i * 4, a * cosine - b * sine)
        s.store_f32(out + (i + half) * 4, a * sine + b * cosine)


@helper
def rotate_normal(x, angles, out, half):
    """Pairs (2i, 2i + 1)."""
    whole = half // 16 * 16
    for i in range(0, whole, 16):
        low, high = s.load(angles + i * 8), s.load(angles + i * 8 + 64)
        cosine, sine = evens(low, high), odds(low, high)
        low, high = s.load(x + i * 8), s.load(x + i * 8 + 64)
        a, b = evens(low, high), odds(low, high)
        first, second = a * cosine - b * sine, a * sine + b * cosine
        s.store(out + i * 8, zip_low(first, second))
        s.store(out + i * 8 + 64, zip_high(first, second))
    for i in range(whole, half):
        cosine, sine = s.load_f32(angles + i * 8), s.load_f32(angles + i * 8 + 4)
        a, b = s.load_f32(x + i * 8), s.load_f32(x + i * 8 + 4)
        s.store_f32(out + i * 8, a * cosine - b * sine)
        s.store_f32(out + i * 8 + 4, a * sine + b * cosine)


ROTATE = {"neox": rotate_neox, "normal": rotate_normal}


@constants(style=("neox", "normal"))
def build_rope(style):
    """Heads rotated, dims behind 2 half as they are: parallel over (token x head)."""
    rotate = ROTATE[style]

    def rope(
        x, angles, out, live, n_heads, head_dim, half, x_stride, x_head_stride, out_stride,
        thread, n_threads,
    ):  # fmt: skip
        first, last = share(s.load_i64(live) * n_heads, thread, n_threads)
        for item in range(first, last):
            row, head = item // n_heads, item % n_heads
            source = x + (row * x_stride + head * x_head_stride) * 4
            target = out + (row * out_stride + head * head_dim) * 4
            rotate(source, angles + row * half * 8, target, half)
            for i in range(2 * half, head_dim):
                s.store_f32(target + i * 4, s.load_f32(source + i * 4))

    return rope
