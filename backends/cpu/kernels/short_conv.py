"""Causal short convolution with its rolling inputs; SiLU and the L2 norm of heads behind it.

Parallel over (block of channels x piece of a sequence's tokens). A block is a head where heads are
normalised, so a norm needs one thread only. The inputs that a sequence keeps for its next step are
read and written by the owner of its first piece; later pieces find all they need in x, so the slot
that is read may be the one that is written.
"""

from __future__ import annotations

from llvmlite import ir

from . import emit as e
from . import simd as s
from .elementwise import get, put
from .rows import helper, share, sum_squares

_PIECE = 64  # tokens; more than the taps, which signatures.py limits
_AHEAD = 8  # rows between a row and the one that is prefetched


@helper
def l2_row(x, out, n, eps):
    """x / sqrt(sum x^2 + eps) of one row; `out` may be x."""
    factor = s.splat(s.f32(1) / s.sqrt_f32(sum_squares(x, n) + eps))
    for i in range(0, n, 16):
        put(out, i, n, get(x, i, n, 0) * factor)


def build_l2_norm():
    def l2_norm(x, out, live, heads, n, x_stride, head_stride, eps, thread, n_threads):
        first, last = share(s.load_i64(live) * heads, thread, n_threads)
        for row in range(first, last):
            at = row // heads * x_stride + row % heads * head_stride
            l2_row(x + at * 4, out + row * n * 4, n, s.float_of(eps))

    return l2_norm


@s.operation(s.void, s.i64, s.i64)
def lay_four(b, w, target):
    """Filters [16][4] as [4][16]."""
    parts = [e.load(b, e.offset(b, w, 64 * j), e.wide(e.f32), 4) for j in range(4)]

    def join(x, y):
        size = 2 * x.type.count
        return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(e.i32, size), list(range(size))))

    whole = join(join(*parts[:2]), join(*parts[2:]))
    for tap in range(4):
        e.store(b, e.lanes_of(b, whole, list(range(tap, 64, 4))), e.offset(b, target, 64 * tap), 4)


@helper
def lay_taps(w, taps, n, target):
    """Filters [n, taps] as [n / 16][taps][16]: a tap of 16 channels is one vector."""
    for i in range(0, n, 16):
        if taps == 4 and n - i >= 16:
            lay_four(w + i * 16, target + i * 16)
        else:
            for j in range(taps):
                for c in range(min(16, n - i)):
                    value = s.load_f32(w + ((i + c) * taps + j) * 4)
                    s.store_f32(target + i * taps * 4 + j * 64 + c * 4, value)


@helper
def past_input(x, past, row, taps, x_bytes, past_bytes, n):
    """Input `row` of a sequence's tokens in this step; those before 0 lie in its slot, if any."""
    if row >= 0:
        return get(x + row * x_bytes, 0, n, 0)
    if past != 0:
        return get(past + (row + taps - 1) * past_bytes, 0, n, 0)
    return s.splat(s.f32(0))


@helper
def conv_at(x, past, w, t, taps, x_bytes, past_bytes, n):
    """The sum over taps for token t of up to 16 channels; taps are added in order."""
    sums, at = s.splat(s.f32(0)), x + (t - 3) * x_bytes
    if taps == 4 and t >= 3 and n >= 16:
        s.prefetch(x + (t + _AHEAD) * x_bytes)
        sums = s.fma(s.load(w), s.load(at), sums)
        sums = s.fma(s.load(w + 64), s.load(at + x_bytes), sums)
        sums = s.fma(s.load(w + 128), s.load(at + 2 * x_bytes), sums)
        return s.fma(s.load(w + 192), s.load(at + 3 * x_bytes), sums)
    for j in range(taps):
        value = past_input(x, past, t - taps + 1 + j, taps, x_bytes, past_bytes, n)
        sums = s.fma(s.load(w + j * 64), value, sums)
    return sums


@helper
def roll(x, past, target, count, taps, x_bytes, past_bytes, n):
    """The last taps - 1 inputs to a slot, oldest first; `target` may be `past`."""
    for j in range(taps - 1):
        row = count - taps + 1 + j
        for i in range(0, n, 16):
            before = past + i * 4 if past != 0 else 0
            value = past_input(x + i * 4, before, row, taps, x_bytes, past_bytes, n - i)
            put(target + j * past_bytes, i, n, value)


def _convolution(activate):
    def convolution(
        x, w, state, slot_bytes, runs, slot_in, slot_out, out, live, channels, taps, block,
        x_stride, norm_first, norm_end, eps, scratch, scratch_bytes, thread, n_threads,
    ):  # fmt: skip
        filters, x_bytes, bytes = scratch + thread * scratch_bytes, x_stride * 4, channels * 4
        for sequence in range(s.load_i64(live)):
            row, count = s.load_i32(runs + sequence * 8), s.load_i32(runs + sequence * 8 + 4)
            source = s.load_i32(slot_in + sequence * 4)
            target = state + s.load_i32(slot_out + sequence * 4) * slot_bytes
            pieces = max(1, (count + _PIECE - 1) // _PIECE)
            blocks = (channels + block - 1) // block
            first, last = share(blocks * pieces, thread, n_threads)
            for item in range(first, last):
                start, begin = item // pieces * block, item % pieces * _PIECE
                n, normed = min(block, channels - start), norm_first <= start < norm_end
                past = state + source * slot_bytes + start * 4 if source >= 0 else 0
                here, there = x + row * x_bytes + start * 4, out + row * bytes + start * 4
                lay_taps(w + start * taps * 4, taps, n, filters)
                for t in range(begin, min(count, begin + _PIECE)):
                    for i in range(0, n, 16):
                        before, at = past + i * 4 if past != 0 else 0, filters + i * taps * 4
                        sums = conv_at(here + i * 4, before, at, t, taps, x_bytes, bytes, n - i)
                        put(there + t * bytes, i, n, activate(sums))
                    if normed:
                        l2_row(there + t * bytes, there + t * bytes, n, s.float_of(eps))
                if begin == 0:
                    roll(here, past, target + start * 4, count, taps, x_bytes, bytes, n)

    return convolution


def build_short_conv():
    return _convolution(helper(lambda x: x))


def build_conv_post():
    return _convolution(helper(lambda x: s.silu(x)))


KERNELS = {
    "l2_norm": build_l2_norm,
    "short_conv": build_short_conv,
    "conv_post": build_conv_post,
}
