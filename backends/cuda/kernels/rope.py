"""Rotary position embedding: angles once per step, a thread per angle; then rotation, a block of
threads per (head, token), a thread per pair of values."""

from __future__ import annotations

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    block_y,
    constant2,
    entry,
    f32,
    floor,
    fma,
    launch_next,
    launch_wait,
    load,
    load2,
    round_i32,
    store,
    store2,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.plan.catalogue import constants

_THREADS = 64
_TWO_PI = f32(6.283185307179586)
# minimax polynomials on [-pi/4, pi/4] of (sin(x) - x) / x^3 and (cos(x) - 1 + x^2 / 2) / x^4
_SIN = f32(-1.6666654611e-1), f32(8.3321608736e-3), f32(-1.9515295891e-4)
_COS = f32(4.166664568298827e-2), f32(-1.388731625493765e-3), f32(2.443315711809948e-5)
_SIN0, _SIN1, _SIN2 = _SIN
_COS0, _COS1, _COS2 = _COS


def turned(t):
    """(cos, sin) of t turns, for |t| <= 1: an eighth of a turn by polynomial, then quadrants."""
    quadrant = round_i32(f32(4) * t)
    x = (t - f32(0.25) * f32(quadrant)) * _TWO_PI
    z = x * x
    s = fma(fma(fma(_SIN2, z, _SIN1), z, _SIN0) * z, x, x)
    c = fma(fma(fma(_COS2, z, _COS1), z, _COS0) * z, z, fma(f32(-0.5), z, f32(1)))
    if quadrant & 1:
        s, c = c, -s
    if quadrant & 2:
        s, c = -s, -c
    return c, s


def build_rope_angles() -> Declared:
    """out f32 [tokens, half, 2] = cos and sin of position x frequency, times `magnitude`.

    positions i32 [tokens, width]; where width > 1, `components` i32 [half] says which of a token's
    each frequency turns with. `turns` f32 [half, 2]: frequency / 2 pi in two parts, the second what
    the first lacks, so that far positions keep their angle. Grid (half / 64 rounded up, tokens).
    """

    @entry(
        "positions:i32* components:i32* turns:f32* out:f32* width:u32 half:u32 magnitude:f32",
        threads=_THREADS,
    )
    def rope_angles(positions, components, turns, out, width, half, magnitude):
        launch_next()
        i, token = u32(block_x() * _THREADS + thread_x()), block_y()
        launch_wait()
        if i < half:
            place = u32(token * width)
            if width > 1:
                place = u32(place + load(components, i))
            p = f32(load(positions, place))
            high, low = constant2(turns, i)
            whole = p * high
            rest = fma(p, high, -whole) + p * low
            c, s = turned((whole - floor(whole)) + rest)
            store2(out, u32(token * half + i), c * magnitude, s * magnitude)

    return rope_angles


@constants(style=("neox", "normal"))
def build_rope(style: str) -> Declared:
    """out = x with pairs of values rotated, (i, i + half) for "neox", (2 i, 2 i + 1) for "normal".

    x f32 [tokens, heads, dim] of strides x_stride and x_head_stride, out likewise; values from
    2 half on are copied. x and out may be the same. Grid (heads, tokens).
    """
    first, apart = (1, 0) if style == "neox" else (2, 1)

    @entry(
        "x:f32* angles:f32* out:f32* half:u32 dim:u32 x_stride:u32 x_head_stride:u32 "
        "out_stride:u32 out_head_stride:u32",
        threads=_THREADS,
    )
    def rope(
        x, angles, out, half, dim, x_stride, x_head_stride, out_stride, out_head_stride
    ):  # fmt: skip
        launch_next()
        source = u32(block_y() * x_stride + u32(block_x() * x_head_stride))
        target = u32(block_y() * out_stride + u32(block_x() * out_head_stride))
        step = u32(apart) if apart else half
        launch_wait()
        i = thread_x()
        while i < half:
            c, s = load2(angles, u32(block_y() * half + i))
            at = u32(first * i)
            a, b = load(x, u32(source + at)), load(x, u32(source + at + step))
            store(out, u32(target + at), a * c - b * s)
            store(out, u32(target + at + step), a * s + b * c)
            i = u32(i + _THREADS)
        i = u32(2 * half + thread_x())
        while i < dim:
            store(out, u32(target + i), load(x, u32(source + i)))
            i = u32(i + _THREADS)

    return rope
