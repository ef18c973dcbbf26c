"""RMS and L2 norms: a block of threads per row, each thread 4 neighbouring values at a time.

Rows of any length; `wide` ones are multiples of 4 at multiples of 16 bytes, and have the same bits.
The row is read twice, the second time from the cache.
"""

from __future__ import annotations

from collections.abc import Callable

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    block_y,
    constant4,
    divide,
    entry,
    f32,
    fma,
    launch_next,
    launch_wait,
    load,
    load4,
    rsqrt,
    store,
    store4,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.plan.catalogue import constants

from .pack import pack_values
from .sums import block_sum

WARPS = 8  # of long rows, and of all that are packed
SHORT = 256  # values of a row that one warp takes


def warps_of(n: int) -> int:
    """Warps for a row of n values: the order of its sum."""
    return 1 if n <= SHORT else WARPS


def squares(v, total):
    """total + the squares of four values."""
    return fma(v[3], v[3], fma(v[2], v[2], fma(v[1], v[1], fma(v[0], v[0], total))))


def scaled(v, w, r):
    """v * r * w of four values: `r` the row's factor, `w` the norm's weights."""
    return (v[0] * r) * w[0], (v[1] * r) * w[1], (v[2] * r) * w[2], (v[3] * r) * w[3]


def load_wide(x, at, i, n):
    """Values 4 i to 4 i + 3 of a row that begins at element `at`, a multiple of 4."""
    return load4(x, u32(u32(at >> 2) + i))


def load_any(x, at, i, n):
    """The same of a row of n values anywhere; zeros behind its end."""
    first = u32(4 * i)
    a, b, c, d = f32(0), f32(0), f32(0), f32(0)
    if first < n:
        a = load(x, u32(at + first))
    if u32(first + 1) < n:
        b = load(x, u32(at + first + 1))
    if u32(first + 2) < n:
        c = load(x, u32(at + first + 2))
    if u32(first + 3) < n:
        d = load(x, u32(at + first + 3))
    return a, b, c, d


def store_wide(out, at, i, n, v):
    """The inverse of `load_wide`."""
    store4(out, u32(u32(at >> 2) + i), v[0], v[1], v[2], v[3])


def store_any(out, at, i, n, v):
    """The inverse of `load_any`."""
    first = u32(4 * i)
    if first < n:
        store(out, u32(at + first), v[0])
    if u32(first + 1) < n:
        store(out, u32(at + first + 1), v[1])
    if u32(first + 2) < n:
        store(out, u32(at + first + 2), v[2])
    if u32(first + 3) < n:
        store(out, u32(at + first + 3), v[3])


def _wide_weights(w, at, i, n):
    """Weights of values 4 i to 4 i + 3."""
    return constant4(w, i)


def _row_factor(warps: int, load_four: Callable) -> Callable:
    total = block_sum(warps)

    def factor(x, at, n, divisor, eps):
        """1 / sqrt(sum of squares / divisor + eps) of a row."""
        square = f32(0)
        i, pieces = thread_x(), u32(u32(n + 3) >> 2)
        while i < pieces:
            square = squares(load_four(x, at, i, n), square)
            i = u32(i + 32 * warps)
        return rsqrt(divide(total(square), divisor) + eps)

    return factor


@constants(wide=(False, True), warps=(1, WARPS))
def build_norm(wide: bool, warps: int) -> Declared:
    """out[row] = x[row] / sqrt(sum(x[row]^2) / divisor + eps), `weighted` times w: rows of n.

    Row (head, token) of x begins at token x_stride + head x_head_stride, of out likewise; they may
    be the same. Grid (heads, tokens).
    """
    load_four, store_four = (load_wide, store_wide) if wide else (load_any, store_any)
    weights_of = _wide_weights if wide else load_any
    row_factor = _row_factor(warps, load_four)

    @entry(
        "x:f32* w:f32* out:f32* n:u32 x_stride:u32 x_head_stride:u32 out_stride:u32 "
        "out_head_stride:u32 divisor:f32 eps:f32 weighted:u32",
        threads=32 * warps,
    )
    def norm(
        x, w, out, n, x_stride, x_head_stride, out_stride, out_head_stride, divisor, eps, weighted
    ):  # fmt: skip
        launch_next()
        source = u32(u32(block_y() * x_stride) + u32(block_x() * x_head_stride))
        target = u32(u32(block_y() * out_stride) + u32(block_x() * out_head_stride))
        launch_wait()
        r = row_factor(x, source, n, divisor, eps)
        i, pieces = thread_x(), u32(u32(n + 3) >> 2)
        while i < pieces:
            by = f32(1), f32(1), f32(1), f32(1)
            if weighted:
                by = weights_of(w, u32(0), i, n)
            store_four(out, target, i, n, scaled(load_four(x, source, i, n), by, r))
            i = u32(i + 32 * warps)

    return norm


def build_rms_norm_packed() -> Declared:
    """RMS norm of `wide` rows of n, x_stride apart, to packed int8. Grid = rows."""
    row_factor = _row_factor(WARPS, load_wide)

    @entry(
        "x:f32* w:f32* out:u32* n:u32 x_stride:u32 divisor:f32 eps:f32 stretches:u32 length:u32",
        threads=32 * WARPS,
    )
    def rms_norm_packed(x, w, out, n, x_stride, divisor, eps, stretches, length):
        launch_next()
        source, pieces = u32(block_x() * x_stride), u32(n >> 2)
        launch_wait()
        r = row_factor(x, source, n, divisor, eps)
        first, end = u32(0), u32(8 * u32(stretches * length))
        while first < end:
            i = u32(first + thread_x())
            at = min(i, u32(pieces - 1))
            v = scaled(load_wide(x, source, at, n), constant4(w, at), r)
            if i >= pieces:
                v = f32(0), f32(0), f32(0), f32(0)
            pack_values(v, out, block_x(), i, stretches, length, i < end)
            first = u32(first + 32 * WARPS)

    return rms_norm_packed
