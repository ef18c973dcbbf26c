"""How 32 values become codes: the arithmetic of `Coding.round` in ops/kv_formats.py, bit by bit.

Products and sums are rounded apart, without fused multiply-add, and sums are taken in that order;
those of all ways to round, or of all that a scale is fitted from, at once.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from runtime.backends.cpu import llvm
from runtime.ops.kv_formats import GROUP, SMALLEST, Coding

from . import emit as e
from .kv_dots import folded

Value = Any
Halves = list[Value]  # two vectors of 16 dims


def _float(value: float) -> ir.Constant:
    return ir.Constant(e.f32, e.single(value))


def _each(halves: Halves, apply: Any) -> Halves:
    return [apply(half) for half in halves]


def _fold(b: ir.IRBuilder, vectors: list[Value], combine: Any) -> list[Value]:
    """Scalars: the lanes of each vector combined, in the order of `group_sum`."""
    value = folded(b, vectors, combine)
    return [b.extract_element(value, ir.Constant(e.i32, i)) for i in range(len(vectors))]


def _totals(b: ir.IRBuilder, *pairs: tuple[Halves, Halves | None]) -> list[Value]:
    """The sums of x, or of x * y, for each pair as `group_sum` takes them."""
    sums = []
    for x, y in pairs:
        terms = x if y is None else [b.fmul(p, q) for p, q in zip(x, y, strict=True)]
        sums.append(b.fadd(*terms))
    return _fold(b, sums, b.fadd)


def _largest(b: ir.IRBuilder, *values: Halves) -> list[Value]:
    return _fold(b, [e.larger(b, *x) for x in values], lambda x, y: e.larger(b, x, y))


def _nearest(b: ir.IRBuilder, coding: Coding, steps: Value) -> Value:
    """float32 q nearest to real ones."""
    if not coding.book:
        lowest, highest = (e.floats(float(n)) for n in (coding.lowest, coding.highest))
        return e.larger(b, lowest, e.smaller(b, highest, e.nearest(b, steps)))
    value = e.floats(float(coding.book[0]))
    for i, edge in enumerate(coding.edges):
        more = e.floats(float(coding.book[i + 1] - coding.book[i]))
        above = b.fcmp_ordered(">", steps, e.floats(float(edge)))
        value = b.fadd(value, b.select(above, more, e.floats(0.0)))
    return value


def _codes(b: ir.IRBuilder, coding: Coding, q: Value) -> Value:
    if not coding.book:
        return b.sub(e.nearest_int(b, q), e.ints(coding.lowest))
    code = e.ints(0)
    for entry in coding.book[1:]:
        there = b.fcmp_ordered(">=", q, e.floats(float(entry)))
        code = b.add(code, b.zext(there, e.wide(e.i32)))
    return code


def _best(b: ir.IRBuilder, ways: list[tuple[Halves, Halves]]) -> Halves:
    """Of ways to round, (off by, q), the q with the least squared error; the first of equals."""
    least, *errors = _totals(b, *((off, off) for off, _ in ways))
    best = ways[0][1]
    for error, (_, q) in zip(errors, ways[1:], strict=True):
        wins = b.fcmp_ordered("<", error, least)
        least = b.select(wins, error, least)
        best = [b.select(wins, x, y) for x, y in zip(q, best, strict=True)]
    return best


def _quotients(b: ir.IRBuilder, numbers: list[float], by: Value) -> list[tuple[Value, Value]]:
    """number / by and by / number in all lanes, for each of four numbers."""
    kind = llvm.vec(e.f32, len(numbers))
    four, many = ir.Constant(kind, [e.single(n) for n in numbers]), llvm.splat(b, by, len(numbers))
    both = b.fdiv(four, many), b.fdiv(many, four)
    return [tuple(e.lanes_of(b, x, [i] * e.LANES) for x in both) for i in range(len(numbers))]


def rounding(b: ir.IRBuilder, coding: Coding, low: Value, high: Value) -> tuple[Halves, Halves]:
    """int32 codes of two vectors of dims, and the scale, or the scale and the minimum."""
    make = _with_minimum if coding.has_minimum else _scaled
    some, q, shared = make(b, coding, [low, high])
    none = _nearest(b, coding, e.floats(0.0)) if not coding.has_minimum else e.floats(0.0)
    q = _each(q, lambda half: b.select(some, half, none))
    return _each(q, lambda half: _codes(b, coding, half)), shared


def _scaled(b: ir.IRBuilder, coding: Coding, x: Halves) -> tuple[Value, Halves, list[Value]]:
    zero = _float(0.0)
    peak, top = _largest(b, _each(x, lambda half: e.absolute(b, half)), x)
    largest = b.select(b.fcmp_ordered(">=", top, peak), peak, b.fneg(peak))
    ways = []
    for inverse, scale in _quotients(b, list(coding.tries), largest):
        q = [_nearest(b, coding, b.fmul(half, inverse)) for half in x]
        ways.append((_off(b, x, q, scale), q))
    best = _best(b, ways)
    some = b.fcmp_ordered(">=", peak, _float(SMALLEST))
    product, square, nothing = _totals(b, (x, best), (best, best), (_nothing(b, x), None))
    scale = b.select(some, b.fdiv(product, square), zero)
    return some, best, [b.fadd(scale, nothing)]


def _off(b: ir.IRBuilder, x: Halves, q: Halves, scale: Value) -> Halves:
    return [b.fsub(half, b.fmul(codes, scale)) for half, codes in zip(x, q, strict=True)]


def _with_minimum(b: ir.IRBuilder, coding: Coding, x: Halves) -> tuple[Value, Halves, list[Value]]:
    zero, n = _float(0.0), _float(float(GROUP))
    minus, top = _largest(b, _each(x, b.fneg), x)
    low = b.fneg(minus)
    extent = b.fsub(top, low)
    above = _each(x, lambda half: b.fsub(half, e.splat(b, low)))
    steps = [coding.highest / (1 - below - beyond) for below, beyond in coding.cuts]
    ways = []
    for (below, _), pair in zip(coding.cuts, _quotients(b, steps, extent), strict=True):
        inverse, scale = pair
        start = e.splat(b, b.fmul(_float(below), extent))
        left = [b.fsub(half, start) for half in above]
        q = [_nearest(b, coding, b.fmul(half, inverse)) for half in left]
        ways.append((_off(b, left, q, scale), q))
    best = _best(b, ways)
    total, sums, product, square = _totals(
        b, (above, None), (best, None), (above, best), (best, best)
    )
    covariance = b.fsub(product, b.fdiv(b.fmul(total, sums), n))
    variance = b.fsub(square, b.fdiv(b.fmul(sums, sums), n))
    some = b.and_(
        b.fcmp_ordered(">=", extent, _float(SMALLEST)), b.fcmp_ordered(">", variance, zero)
    )
    (nothing,) = _totals(b, (_nothing(b, x), None))
    scale = b.select(some, b.fdiv(covariance, variance), zero)
    lift = b.fdiv(b.fsub(total, b.fmul(scale, sums)), n)
    minimum = b.fadd(low, b.select(some, lift, zero))
    return some, best, [b.fadd(scale, nothing), b.fadd(minimum, nothing)]


def _nothing(b: ir.IRBuilder, x: Halves) -> Halves:
    """0, or NaN where a value is not finite."""
    return _each(x, lambda half: b.fmul(half, e.floats(0.0)))
