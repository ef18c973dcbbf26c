"""Softmax and normalisation of short rows: a warp a row, which it reads twice or three times."""

from __future__ import annotations

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    divide,
    entry,
    f32,
    fmax,
    launch_next,
    launch_wait,
    load,
    shuffle_xor,
    store,
    thread_x,
    u32,
)  # fmt: skip

from .elementwise import exp
from .sums import warp_sum

_LOWEST = f32(-float("inf"))


def warp_max(value):
    """The largest of a warp, in every lane."""
    value = fmax(value, shuffle_xor(value, 16))
    value = fmax(value, shuffle_xor(value, 8))
    value = fmax(value, shuffle_xor(value, 4))
    value = fmax(value, shuffle_xor(value, 2))
    value = fmax(value, shuffle_xor(value, 1))
    return value


def exp_sum(x, base, n, peak, lane):
    """Sum of e^(x - peak) over a row that begins at `base`; in every lane of the warp."""
    total = f32(0)
    i = lane
    while i < n:
        total += exp(load(x, u32(base + i)) - peak)
        i = u32(i + 32)
    return warp_sum(total)


def build_softmax() -> Declared:
    """out f32 [rows, n] = e^(x - max) / sum of each row of x, `x_stride` apart. Grid = rows."""

    @entry("x:f32* out:f32* n:u32 x_stride:u32", threads=32)
    def softmax(x, out, n, x_stride):
        launch_next()
        base, lane, peak = u32(block_x() * x_stride), thread_x(), _LOWEST
        launch_wait()
        i = lane
        while i < n:
            peak = fmax(peak, load(x, u32(base + i)))
            i = u32(i + 32)
        peak = warp_max(peak)
        whole = exp_sum(x, base, n, peak, lane)
        i = lane
        while i < n:
            value = divide(exp(load(x, u32(base + i)) - peak), whole)
            store(out, u32(block_x() * n + i), value)
            i = u32(i + 32)

    return softmax


def build_normalize() -> Declared:
    """out f32 [rows, n] = x / sum of each row of x, `x_stride` apart. Grid = rows."""

    @entry("x:f32* out:f32* n:u32 x_stride:u32", threads=32)
    def normalize(x, out, n, x_stride):
        launch_next()
        base, lane, total = u32(block_x() * x_stride), thread_x(), f32(0)
        launch_wait()
        i = lane
        while i < n:
            total += load(x, u32(base + i))
            i = u32(i + 32)
        whole = warp_sum(total)
        i = lane
        while i < n:
            store(out, u32(block_x() * n + i), divide(load(x, u32(base + i)), whole))
            i = u32(i + 32)

    return normalize
