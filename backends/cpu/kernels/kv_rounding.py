"""How 32 values become codes: the arithmetic of `Coding.round` in ops/kv_formats.py, bit by bit.

Products and sums are rounded apart, without fused multiply-add, and sums are taken in that order.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from runtime.ops.kv_formats import GROUP, SMALLEST, Coding

from . import emit as e

Value = Any
Halves = list[Value]  # two vectors of 16 dims


def _float(value: float) -> ir.Constant:
    return ir.Constant(e.f32, e.single(value))


def _each(halves: Halves, apply: Any) -> Halves:
    return [apply(half) for half in halves]


def _total(b: ir.IRBuilder, x: Halves, y: Halves | None = None) -> Value:
    """The sum of x, or of x * y, as `group_sum` takes it."""
    terms = x if y is None else [b.fmul(p, q) for p, q in zip(x, y, strict=True)]
    return e.total(b, b.fadd(*terms))


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


class _Best:
    """The way to round with the least squared error, so far."""

    def __init__(self, b: ir.IRBuilder) -> None:
        self.b, self.error = b, None
        self.q: Halves = []

    def offer(self, off: Halves, q: Halves) -> None:
        """Take q, which is off by `off`, if it is better."""
        b, error = self.b, _total(self.b, off, off)
        if self.error is None:
            self.error, self.q = error, q
            return
        wins = b.fcmp_ordered("<", error, self.error)
        self.error = b.select(wins, error, self.error)
        self.q = [b.select(wins, x, y) for x, y in zip(q, self.q, strict=True)]


def rounding(b: ir.IRBuilder, coding: Coding, low: Value, high: Value) -> tuple[Halves, Halves]:
    """int32 codes of two vectors of dims, and the scale, or the scale and the minimum."""
    make = _with_minimum if coding.has_minimum else _scaled
    some, q, shared = make(b, coding, [low, high])
    none = _nearest(b, coding, e.floats(0.0)) if not coding.has_minimum else e.floats(0.0)
    q = _each(q, lambda half: b.select(some, half, none))
    return _each(q, lambda half: _codes(b, coding, half)), shared


def _extremes(b: ir.IRBuilder, x: Halves) -> tuple[Value, Value]:
    """The smallest and the largest value."""
    minus = e.largest(b, e.larger(b, *_each(x, b.fneg)))
    return b.fneg(minus), e.largest(b, e.larger(b, *x))


def _scaled(b: ir.IRBuilder, coding: Coding, x: Halves) -> tuple[Value, Halves, list[Value]]:
    zero = _float(0.0)
    peak = e.largest(b, e.larger(b, *_each(x, lambda half: e.absolute(b, half))))
    _, top = _extremes(b, x)
    largest = b.select(b.fcmp_ordered(">=", top, peak), peak, b.fneg(peak))
    best = _Best(b)
    for goal in coding.tries:
        inverse = e.splat(b, b.fdiv(_float(goal), largest))
        scale = e.splat(b, b.fdiv(largest, _float(goal)))
        q = [_nearest(b, coding, b.fmul(half, inverse)) for half in x]
        best.offer(_off(b, x, q, scale), q)
    some = b.fcmp_ordered(">=", peak, _float(SMALLEST))
    fitted = b.fdiv(_total(b, x, best.q), _total(b, best.q, best.q))
    scale = b.select(some, fitted, zero)
    return some, best.q, [b.fadd(scale, _not_finite(b, x))]


def _off(b: ir.IRBuilder, x: Halves, q: Halves, scale: Value) -> Halves:
    return [b.fsub(half, b.fmul(codes, scale)) for half, codes in zip(x, q, strict=True)]


def _with_minimum(b: ir.IRBuilder, coding: Coding, x: Halves) -> tuple[Value, Halves, list[Value]]:
    zero, n = _float(0.0), _float(float(GROUP))
    low, top = _extremes(b, x)
    extent = b.fsub(top, low)
    above = _each(x, lambda half: b.fsub(half, e.splat(b, low)))
    best = _Best(b)
    for below, beyond in coding.cuts:
        steps = _float(coding.highest / (1 - below - beyond))
        start = e.splat(b, b.fmul(_float(below), extent))
        inverse, scale = (e.splat(b, b.fdiv(*pair)) for pair in ((steps, extent), (extent, steps)))
        left = [b.fsub(half, start) for half in above]
        q = [_nearest(b, coding, b.fmul(half, inverse)) for half in left]
        best.offer(_off(b, left, q, scale), q)
    total, sums = _total(b, above), _total(b, best.q)
    covariance = b.fsub(_total(b, above, best.q), b.fdiv(b.fmul(total, sums), n))
    variance = b.fsub(_total(b, best.q, best.q), b.fdiv(b.fmul(sums, sums), n))
    some = b.and_(
        b.fcmp_ordered(">=", extent, _float(SMALLEST)), b.fcmp_ordered(">", variance, zero)
    )
    nothing = _not_finite(b, x)
    scale = b.select(some, b.fdiv(covariance, variance), zero)
    lift = b.fdiv(b.fsub(total, b.fmul(scale, sums)), n)
    minimum = b.fadd(low, b.select(some, lift, zero))
    return some, best.q, [b.fadd(scale, nothing), b.fadd(minimum, nothing)]


def _not_finite(b: ir.IRBuilder, x: Halves) -> Value:
    """0, or NaN where a value is not finite."""
    return e.total(b, b.fmul(b.fadd(*_each(x, lambda half: b.fmul(half, e.floats(0.0)))),
                             e.floats(0.0)))  # fmt: skip
