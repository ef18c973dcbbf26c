"""RMS norm: one block of threads per row, 4 values a thread at a time; rows are multiples of 4.

The row is read twice, the second time from the cache. With `packed` the result is int8 for the
products that follow (rows are multiples of 32 then).
"""

from __future__ import annotations

from collections.abc import Callable

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    constant4,
    divide,
    entry,
    f32,
    launch_next,
    launch_wait,
    load4,
    rsqrt,
    store4,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.plan.catalogue import constants

from .pack import pack_values
from .sums import block_sum

_WARPS = 8
_THREADS = 32 * _WARPS


def _row_factor() -> Callable:
    total = block_sum(_WARPS)

    def factor(x, base, pieces, eps):
        """1 / sqrt(mean of squares + eps) of a row."""
        square = f32(0)
        i = thread_x()
        while i < pieces:
            v = load4(x, u32(base + i))
            square += v[0] * v[0] + v[1] * v[1] + (v[2] * v[2] + v[3] * v[3])
            i = u32(i + _THREADS)
        count = f32(u32(4 * pieces))
        return rsqrt(divide(total(square), count) + eps)

    return factor


def scaled(v, w, r):
    """v * r * w of four values: `r` the row's factor, `w` the norm's weights."""
    return (v[0] * r) * w[0], (v[1] * r) * w[1], (v[2] * r) * w[2], (v[3] * r) * w[3]


@constants(packed=(False, True))
def build_rms_norm(packed: bool) -> Declared:
    """out[row] = x[row] / sqrt(mean(x[row]^2) + eps) * w, 4 `pieces` values. Grid = rows."""
    row_factor = _row_factor()

    @entry("x:f32* w:f32* out:f32* pieces:u32 eps:f32", threads=_THREADS)
    def rms_norm(x, w, out, pieces, eps):
        launch_next()
        base = u32(block_x() * pieces)
        launch_wait()
        r = row_factor(x, base, pieces, eps)
        i = thread_x()
        while i < pieces:
            v = scaled(load4(x, u32(base + i)), constant4(w, i), r)
            store4(out, u32(base + i), v[0], v[1], v[2], v[3])
            i = u32(i + _THREADS)

    @entry("x:f32* w:f32* out:u32* pieces:u32 eps:f32 stretches:u32 length:u32", threads=_THREADS)
    def rms_norm_packed(x, w, out, pieces, eps, stretches, length):
        launch_next()
        base = u32(block_x() * pieces)
        launch_wait()
        r = row_factor(x, base, pieces, eps)
        first, end = u32(0), u32(8 * u32(stretches * length))
        while first < end:
            i = u32(first + thread_x())
            at = min(i, u32(pieces - 1))
            v = scaled(load4(x, u32(base + at)), constant4(w, at), r)
            if i >= pieces:
                v = f32(0), f32(0), f32(0), f32(0)
            pack_values(v, out, block_x(), i, stretches, length, i < end)
            first = u32(first + _THREADS)

    return rms_norm_packed if packed else rms_norm
