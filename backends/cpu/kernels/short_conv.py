"""Causal short convolution with its rolling inputs; SiLU and the L2 norm of heads behind it.

Parallel over (block of channels x piece of a sequence's tokens). A block is a head where heads are
normalised, so a norm needs one thread only. The inputs that a sequence keeps for its next step are
read and written by the owner of its first piece; later pieces find all they need in x, so the slot
that is read may be the one that is written.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

from . import emit as e
from . import simd as s
from .elementwise import get, put
from .emit import number
from .rows import ask_for, clear, helper, share, sum_squares

_PIECE = 64  # tokens; more than the taps, which abi.py limits
_AHEAD = 8  # rows between a row and the one that is prefetched


@helper
def l2_row(x, out, n, eps):
    """x / sqrt(sum x^2 + eps) of one row; `out` may be x."""
    factor = s.splat(s.f32(1) / s.sqrt_f32(sum_squares(x, n) + eps))
    for i in range(0, n, 16):
        put(out, i, n, get(x, i, n, 0) * factor)


def build_l2_norm():
    """x / sqrt(sum of squares + eps) of each head: parallel over (row x head)."""

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


def _four_taps(activate):
    @s.operation(s.f32, *[s.i64] * 7)
    def four_taps(b, first, second, third, fourth, w, out, n):
        """activate(sum over four rows) of n channels, a multiple of 16; the sum of its squares.

        Squares are added as `sum_squares` adds them.
        """
        sums = [cgutils.alloca_once_value(b, e.floats(0.0)) for _ in range(4)]

        def unit(i, j, slot):
            at, value = b.shl(i, number(2)), e.floats(0.0)
            for tap, row in enumerate((first, second, third, fourth)):
                place = e.offset(b, b.add(w, b.shl(i, number(4))), 256 * j + 64 * tap)
                x = e.load(b, e.offset(b, b.add(row, at), 64 * j), e.wide(e.f32), 4)
                value = e.fma(b, e.load(b, place, e.wide(e.f32), 4), x, value, s.FUSED)
            value = activate(b, value)
            e.store(b, value, e.offset(b, b.add(out, at), 64 * j), 4)
            b.store(e.fma(b, value, value, b.load(slot), s.FUSED), slot)

        whole = b.and_(n, number(-64))
        for start, stop, count in ((number(0), whole, 4), (whole, n, 1)):
            with cgutils.for_range_slice(b, start, stop, number(16 * count), e.i64) as (i, _):
                for j in range(count):
                    unit(i, j, sums[j])
        a, c, d, f = (b.load(slot) for slot in sums)
        return e.total(b, b.fadd(b.fadd(a, c), b.fadd(d, f)))

    return four_taps


@helper
def row_at(x, past, row, taps, x_bytes, past_bytes):
    """Where input `row` of a sequence's tokens in this step lies; those before 0 are in `past`."""
    return x + row * x_bytes if row >= 0 else past + (row + taps - 1) * past_bytes


@helper
def any_taps(x, past, w, t, taps, x_bytes, past_bytes, n):
    """The sum over taps for token t of up to 16 channels; taps are added in order."""
    sums = s.splat(s.f32(0))
    for j in range(taps):
        at = row_at(x, past, t - taps + 1 + j, taps, x_bytes, past_bytes)
        sums = s.fma(s.load(w + j * 64), get(at, 0, n, 0), sums)
    return sums


@helper
def roll(x, past, target, count, taps, x_bytes, past_bytes, target_bytes, n):
    """The last taps - 1 inputs to a slot, oldest first; `target` may be `past`."""
    for j in range(taps - 1):
        at = row_at(x, past, count - taps + 1 + j, taps, x_bytes, past_bytes)
        for i in range(0, n, 16):
            put(target + j * target_bytes, i, n, get(at, i, n, 0))


@helper
def scale_row(x, n, factor):
    """n floats, a multiple of 16, times a factor, in place."""
    for i in range(0, n, 16):
        s.store(x + i * 4, s.load(x + i * 4) * s.splat(factor))


def _convolution(activate, four_taps):
    @helper
    def conv_row(x, past, out, filters, t, taps, x_bytes, past_bytes, n, normed, eps):
        """Token t of a block of n channels."""
        if taps == 4 and n % 16 == 0:
            first = row_at(x, past, t - 3, 4, x_bytes, past_bytes)
            second = row_at(x, past, t - 2, 4, x_bytes, past_bytes)
            third = row_at(x, past, t - 1, 4, x_bytes, past_bytes)
            ask_for(x + (t + _AHEAD) * x_bytes, n * 4)
            squares = four_taps(first, second, third, x + t * x_bytes, filters, out, n)
            if normed:
                scale_row(out, n, s.f32(1) / s.sqrt_f32(squares + eps))
        else:
            for i in range(0, n, 16):
                at, before, w = x + i * 4, past + i * 4, filters + i * taps * 4
                sums = any_taps(at, before, w, t, taps, x_bytes, past_bytes, n - i)
                put(out, i, n, activate(sums))
            if normed:
                l2_row(out, out, n, eps)

    def convolution(
        x, w, state, slot_bytes, spans, slot_in, slot_out, out, live, channels, taps, block,
        x_stride, norm_first, norm_end, eps, scratch, scratch_bytes, thread, n_threads,
    ):  # fmt: skip
        zeros, x_bytes, row_bytes = scratch + thread * scratch_bytes, x_stride * 4, channels * 4
        filters, blocks = zeros + (block + 15) // 16 * 64, (channels + block - 1) // block
        clear(zeros, block * 4)
        for sequence in range(s.load_i64(live)):
            row, count = s.load_i32(spans + sequence * 8), s.load_i32(spans + sequence * 8 + 4)
            source = s.load_i32(slot_in + sequence * 4)
            target = state + s.load_i32(slot_out + sequence * 4) * slot_bytes
            pieces = max(1, (count + _PIECE - 1) // _PIECE)
            first, last = share(blocks * pieces, thread, n_threads)
            for item in range(first, last):
                start, begin = item // pieces * block, item % pieces * _PIECE
                n, normed = min(block, channels - start), norm_first <= start < norm_end
                past, past_bytes = state + source * slot_bytes + start * 4, row_bytes
                if source < 0:
                    past, past_bytes = zeros, 0
                here, there = x + row * x_bytes + start * 4, out + row * row_bytes + start * 4
                lay_taps(w + start * taps * 4, taps, n, filters)
                for t in range(begin, min(count, begin + _PIECE)):
                    conv_row(
                        here, past, there + t * row_bytes, filters, t, taps, x_bytes, past_bytes,
                        n, normed, s.float_of(eps),
                    )  # fmt: skip
                if begin == 0:
                    to = target + start * 4
                    roll(here, past, to, count, taps, x_bytes, past_bytes, row_bytes, n)

    return convolution


def build_short_conv():
    """The convolution alone."""
    return _convolution(helper(lambda x: x), _four_taps(lambda b, x: x))


def build_conv_post():
    """SiLU of the convolution; heads from `norm_first` to `norm_end` L2-normalised."""
    silu = _four_taps(lambda b, x: e.silu(b, x, s.FUSED))
    return _convolution(helper(lambda x: s.silu(x)), silu)
