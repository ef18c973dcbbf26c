"""Ops on rows of n float32: sums, products, activations, softmax.

What looks at one element at a time is parallel over (row x units of 16 elements), so one row keeps
every thread busy; softmax and normalize are parallel over rows. A sum over a row has 16 running
sums, joined in a fixed tree, wherever the row lies and whoever computes it.
"""

from __future__ import annotations

from . import simd as s
from .rows import clamped_swiglu, helper, piece, share

_LOWEST = float("-inf")


@helper
def get(x, i, n, fill):
    """Elements i..i+15 of a row of n at an address, `fill` beyond its end."""
    return s.load(x + i * 4) if n - i >= 16 else s.load_part(x + i * 4, n - i, s.f32(fill))


@helper
def put(out, i, n, value):
    """Store what `get` loads."""
    if n - i >= 16:
        s.store(out + i * 4, value)
    else:
        s.store_part(out + i * 4, value, n - i)


@helper
def row_max(x, n):
    """The largest element of a row; -inf of an empty one."""
    best = s.splat(s.f32(_LOWEST))
    for i in range(0, n, 16):
        best = s.larger(get(x, i, n, _LOWEST), best)
    return s.largest(best)


@helper
def row_sum(x, n):
    """The sum of a row."""
    sums = s.splat(s.f32(0))
    for i in range(0, n, 16):
        sums = sums + get(x, i, n, 0)
    return s.total(sums)


@helper
def exp_sum(x, n, peak):
    """Sum of exp(x - peak) over a row."""
    sums, shift = s.splat(s.f32(0)), s.splat(peak)
    for i in range(0, n, 16):
        sums = sums + s.exp(get(x, i, n, _LOWEST) - shift)
    return s.total(sums)


@helper
def softmax_row(x, out, n):
    """exp(x - max) / sum of one row; `out` may be x."""
    peak = row_max(x, n)
    sums, shift = s.splat(s.f32(0)), s.splat(peak)
    for i in range(0, n, 16):
        value = s.exp(get(x, i, n, _LOWEST) - shift)
        sums = sums + value
        put(out, i, n, value)
    whole = s.splat(s.total(sums))
    for i in range(0, n, 16):
        put(out, i, n, get(out, i, n, 0) / whole)


@helper
def normalize_row(x, out, n):
    """x / sum of one row; `out` may be x."""
    whole = s.splat(row_sum(x, n))
    for i in range(0, n, 16):
        put(out, i, n, get(x, i, n, 0) / whole)


def _binary(combine):
    def binary(x, y, out, live, n, x_stride, y_stride, out_stride, thread, n_threads):
        units = (n + 15) // 16
        at, last = share(s.load_i64(live) * units, thread, n_threads)
        while at < last:
            row, first, stop = piece(at, last, units)
            left, right = x + row * x_stride * 4, y + row * y_stride * 4
            for unit in range(first, stop):
                i = unit * 16
                value = combine(get(left, i, n, 0), get(right, i, n, 0))
                put(out + row * out_stride * 4, i, n, value)
            at += stop - first

    return binary


def build_add():
    """x + y."""
    return _binary(helper(lambda x, y: x + y))


def build_mul():
    """x * y."""
    return _binary(helper(lambda x, y: x * y))


def build_swiglu():
    """silu(gate x) * y (Shazeer 2020)."""
    return _binary(helper(lambda x, y: s.silu(x) * y))


def build_swiglu_oai():
    """gpt-oss's SwiGLU of clamped gate x and y: see `clamped_swiglu`."""

    def swiglu_oai(
        x, y, out, live, n, x_stride, y_stride, out_stride, alpha, limit, thread, n_threads
    ):
        units = (n + 15) // 16
        slope, bound = s.splat(s.float_of(alpha)), s.splat(s.float_of(limit))
        at, last = share(s.load_i64(live) * units, thread, n_threads)
        while at < last:
            row, first, stop = piece(at, last, units)
            gate, up = x + row * x_stride * 4, y + row * y_stride * 4
            for unit in range(first, stop):
                i = unit * 16
                value = clamped_swiglu(get(gate, i, n, 0), get(up, i, n, 0), slope, bound)
                put(out + row * out_stride * 4, i, n, value)
            at += stop - first

    return swiglu_oai


def _unary(value):
    def unary(x, out, live, n, x_stride, out_stride, thread, n_threads):
        units = (n + 15) // 16
        at, last = share(s.load_i64(live) * units, thread, n_threads)
        while at < last:
            row, first, stop = piece(at, last, units)
            for unit in range(first, stop):
                i = unit * 16
                result = value(get(x + row * x_stride * 4, i, n, 0))
                put(out + row * out_stride * 4, i, n, result)
            at += stop - first

    return unary


def build_silu():
    """x / (1 + e^-x)."""
    return _unary(helper(lambda x: s.silu(x)))


def build_sigmoid():
    """1 / (1 + e^-x)."""
    return _unary(helper(lambda x: s.sigmoid(x)))


def build_exp():
    """e^x within 2 ulp."""
    return _unary(helper(lambda x: s.exp(x)))


def build_log():
    """The natural logarithm within 2 ulp."""
    return _unary(helper(lambda x: s.log(x)))


def build_softplus():
    """log(1 + e^x) within 4 ulp."""
    return _unary(helper(lambda x: s.softplus(x)))


def build_scale():
    """x times a number, given as the bits of a float32."""

    def scale(x, out, live, n, x_stride, out_stride, factor, thread, n_threads):
        units, by = (n + 15) // 16, s.splat(s.float_of(factor))
        at, last = share(s.load_i64(live) * units, thread, n_threads)
        while at < last:
            row, first, stop = piece(at, last, units)
            for unit in range(first, stop):
                i = unit * 16
                result = get(x + row * x_stride * 4, i, n, 0) * by
                put(out + row * out_stride * 4, i, n, result)
            at += stop - first

    return scale


def build_row_scale():
    """Each row of x times the first element of its row of y."""

    def row_scale(x, y, out, live, n, x_stride, y_stride, out_stride, thread, n_threads):
        units = (n + 15) // 16
        at, last = share(s.load_i64(live) * units, thread, n_threads)
        while at < last:
            row, first, stop = piece(at, last, units)
            by = s.splat(s.load_f32(y + row * y_stride * 4))
            for unit in range(first, stop):
                i = unit * 16
                result = get(x + row * x_stride * 4, i, n, 0) * by
                put(out + row * out_stride * 4, i, n, result)
            at += stop - first

    return row_scale


def _by_row(work):
    def by_row(x, out, live, n, x_stride, out_stride, thread, n_threads):
        first, last = share(s.load_i64(live), thread, n_threads)
        for row in range(first, last):
            work(x + row * x_stride * 4, out + row * out_stride * 4, n)

    return by_row


def build_softmax():
    """e^(x - max) / sum, by row."""
    return _by_row(softmax_row)


def build_normalize():
    """x / sum of x, by row."""
    return _by_row(normalize_row)
