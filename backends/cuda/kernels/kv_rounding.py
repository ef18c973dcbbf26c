"""How 32 dims of a head become codes: the arithmetic of `Coding.round` in ops/kv_formats.py, bit by
bit. A warp takes a group, a lane a dim.

Products are rounded before they are added (`multiply`), and `warp_sum` adds in the order of
`group_sum`: 16 apart, then 8 apart, and so on.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from runtime.backends.cuda.intrinsics import (
    divide,
    f32,
    fabs,
    fmax,
    fmin,
    multiply,
    round_i32,
    shuffle_xor,
    u32,
    vote_any,
)  # fmt: skip
from runtime.backends.cuda.kv_layout import (
    IQ4_NL,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q6_0,
    Q8_0,
    TYPES,
)  # fmt: skip
from runtime.ops.kv_formats import GROUP, KV_FORMATS, SMALLEST

from .sums import warp_sum

_CODINGS = {TYPES[name]: row.coding for name, row in KV_FORMATS.items() if row.coding}
_SMALLEST, _HUGE = f32(SMALLEST), f32(np.finfo(np.float32).max)
_EACH = f32(1 / GROUP)  # exactly
_INFINITE, _NAN = f32(float("inf")), f32(float("nan"))


def _by_scale(value: Callable) -> Callable:
    """A function of the type of codes with a scale alone: value(coding) of each."""
    q8, q6, q5, q4, book = (f32(value(_CODINGS[t])) for t in (Q8_0, Q6_0, Q5_0, Q4_0, IQ4_NL))

    def chosen(type):
        if type == Q8_0:
            return q8
        if type == Q6_0:
            return q6
        if type == Q5_0:
            return q5
        return q4 if type == Q4_0 else book

    return chosen


def _by_cuts(value: Callable) -> Callable:
    """A function of the type of codes with a minimum."""
    four, five = (f32(value(_CODINGS[TYPES[name]])) for name in ("q4_1", "q5_1"))

    def chosen(type):
        return four if type == Q4_1 else five

    return chosen


lowest_of, highest_of = _by_scale(lambda c: c.lowest), _by_scale(lambda c: c.highest)
_GOALS = [_by_scale(lambda c, n=n: c.tries[n]) for n in range(4)]
_goal0, _goal1, _goal2, _goal3 = _GOALS
_STEPS = [_by_cuts(lambda c, n=n: c.highest / (1 - c.cuts[n][0] - c.cuts[n][1])) for n in range(4)]
_BELOW = [_by_cuts(lambda c, n=n: c.cuts[n][0]) for n in range(4)]
_steps0, _steps1, _steps2, _steps3 = _STEPS
_below0, _below1, _below2, _below3 = _BELOW
_most = _by_cuts(lambda c: c.highest)
_BOOK = _CODINGS[IQ4_NL]
_edges = tuple(f32(edge) for edge in _BOOK.edges)
_apart = tuple(f32(b - a) for a, b in zip(_BOOK.book, _BOOK.book[1:], strict=False))
_first = f32(_BOOK.book[0])


def warp_max(value):
    """The largest of a warp, in every lane."""
    value = fmax(value, shuffle_xor(value, 16))
    value = fmax(value, shuffle_xor(value, 8))
    value = fmax(value, shuffle_xor(value, 4))
    value = fmax(value, shuffle_xor(value, 2))
    return fmax(value, shuffle_xor(value, 1))


def _entry(steps):
    """The nearest entry of the book and its number."""
    value, number = _first, u32(0)
    for n in range(15):
        if steps > _edges[n]:
            value += _apart[n]
            number = u32(number + 1)
    return value, number


def _nearest(steps, type):
    """(q nearest to a real one, its code)."""
    if type == IQ4_NL:
        return _entry(steps)
    lowest = lowest_of(type)
    q = fmax(lowest, fmin(highest_of(type), f32(round_i32(steps))))
    return q, u32(round_i32(q - lowest))


def _better(x, largest, goal, type, error, q, code):
    """The way so far, or the one in which the largest value becomes `goal` if that errs less."""
    new, number = _nearest(multiply(x, divide(goal, largest)), type)
    off = x - multiply(new, divide(largest, goal))
    total = warp_sum(multiply(off, off))
    if total < error:
        return total, new, number
    return error, q, code


def scaled(x, type):
    """(code, scale) of this lane's x, finite."""
    peak = warp_max(fabs(x))
    some = peak >= _SMALLEST
    largest = peak if warp_max(x) >= peak else -peak
    if not some:
        largest = f32(1)
    way = _INFINITE, f32(0), u32(0)
    way = _better(x, largest, _goal0(type), type, way[0], way[1], way[2])
    way = _better(x, largest, _goal1(type), type, way[0], way[1], way[2])
    way = _better(x, largest, _goal2(type), type, way[0], way[1], way[2])
    way = _better(x, largest, _goal3(type), type, way[0], way[1], way[2])
    scale = divide(warp_sum(multiply(x, way[1])), warp_sum(multiply(way[1], way[1])))
    if some:
        return way[2], scale
    return _nearest(f32(0), type)[1], f32(0)


def _closer(above, extent, below, steps, most, error, q):
    """As `_better`, with a share `below` of the range cut off."""
    left = above - multiply(below, extent)
    new = fmax(f32(0), fmin(most, f32(round_i32(multiply(left, divide(steps, extent))))))
    off = left - multiply(new, divide(extent, steps))
    total = warp_sum(multiply(off, off))
    if total < error:
        return total, new
    return error, q


def with_minimum(x, type):
    """(code, scale, minimum) of this lane's x, finite."""
    low = -warp_max(-x)
    extent, above, most = warp_max(x) - low, x - low, _most(type)
    some = extent >= _SMALLEST
    span = extent if some else f32(1)
    way = _INFINITE, f32(0)
    way = _closer(above, span, _below0(type), _steps0(type), most, way[0], way[1])
    way = _closer(above, span, _below1(type), _steps1(type), most, way[0], way[1])
    way = _closer(above, span, _below2(type), _steps2(type), most, way[0], way[1])
    way = _closer(above, span, _below3(type), _steps3(type), most, way[0], way[1])
    q = way[1]
    total, sums = warp_sum(above), warp_sum(q)
    covariance = warp_sum(multiply(above, q)) - multiply(multiply(total, sums), _EACH)
    variance = warp_sum(multiply(q, q)) - multiply(multiply(sums, sums), _EACH)
    if not (some and variance > f32(0)):
        return u32(0), f32(0), low
    scale = divide(covariance, variance)
    minimum = low + multiply(total - multiply(scale, sums), _EACH)
    return u32(round_i32(q)), scale, minimum


def rounded(x, type):
    """(code, scale, minimum) of this lane's x; a group that is not finite gets NaN for scale.

    Zeros for types without codes.
    """
    if is_float(type):
        return u32(0), f32(0), f32(0)
    broken = vote_any(0 if fabs(x) <= _HUGE else 1)
    given = f32(0) if broken else x
    code, scale, minimum = u32(0), f32(0), f32(0)
    if has_minimum(type):
        code, scale, minimum = with_minimum(given, type)
    else:
        code, scale = scaled(given, type)
    if broken:
        scale = _NAN
        minimum = scale
    return code, scale, minimum


def has_minimum(type):
    """Whether a type's groups have a minimum beside their scale."""
    return Q5_1 <= type <= Q4_1 and type != Q5_0


def is_float(type):
    """Whether a type keeps values, not codes."""
    return type < Q8_0
