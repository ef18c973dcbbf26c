"""Scales and codes of the least squared error, for sixteen blocks side by side.

A block has parts with a scale of their own (and a minimum), which is a whole number of steps of the
block's scale. Every part is fitted for itself first: several scales are tried, codes follow from a
scale, and from codes the best scale by least squares. Then, in turns, each part takes the best of
the neighbouring steps, and the block the scale that is best for the codes of all parts. Of all
turns the best counts. Errors are weighted by weights that lie as the values do.

Values become codes in place. What is found of parts are vectors one behind the other.
"""

from __future__ import annotations

from typing import NamedTuple

from . import lanes as l
from . import simd as s
from .rows import helper

_HUGE = 3e38
_PARTS = 16  # at most
_mine, _kept = l.room(4 * 64 * _PARTS), l.room(2 * 64 * _PARTS)
_SECOND, _WEIGHT, _MEAN = (i * 64 * _PARTS for i in (1, 2, 3))


class Parts(NamedTuple):
    """`number` parts of `size` values; codes and steps of scales from their lowest to highest."""

    number: int
    size: int
    codes: tuple[int, int]
    steps: tuple[int, int] = (0, 0)


class Starts(NamedTuple):
    """Scales to try: as many codes as the largest value, or the range, has at scale 1."""

    first: float
    step: float
    number: int


@helper
def _ratio(x, y):
    """x / y, and 0 where y is not above 0."""
    zero = s.splat(s.f32(0))
    return s.select(y > zero, x / y, zero)


@helper
def _swap(better, source, target, nbytes):
    """Vectors at source to target, in the lanes that say so."""
    for i in range(0, nbytes, 64):
        s.store(target + i, s.select(better, s.load(source + i), s.load(target + i)))


def _common(parts):
    """(sums, error, put_codes) of a part with codes (x + offset) / scale."""
    nbytes, (low, high) = 64 * parts.size, parts.codes

    @helper
    def sums(values, weights, inverse, offset):
        """Sums of w code, w code^2 and w x code, the scale given as its inverse."""
        first = second = mixed = s.splat(s.f32(0))
        for j in range(0, nbytes, 64):
            x, w = s.load(values + j), s.load(weights + j)
            q = l.code((x + offset) * inverse, s.f32(low), s.f32(high))
            wq = w * q
            first, second, mixed = first + wq, s.fma(wq, q, second), s.fma(wq, x, mixed)
        return first, second, mixed

    @helper
    def error(values, weights, scale, offset):
        total, inverse = s.splat(s.f32(0)), l.inverse(scale)
        for j in range(0, nbytes, 64):
            y = s.load(values + j) + offset
            left = y - l.code(y * inverse, s.f32(low), s.f32(high)) * scale
            total = s.fma(s.load(weights + j) * left, left, total)
        return total

    @helper
    def put_codes(values, scale, offset):
        """Codes, counted from the lowest."""
        inverse = l.inverse(scale)
        for j in range(0, nbytes, 64):
            y = (s.load(values + j) + offset) * inverse
            q = l.code(y, s.f32(low), s.f32(high)) - s.splat(s.f32(low))
            l.store_ints(values + j, l.truncated(q))

    return sums, error, put_codes


def fit_centred(parts, starts):
    """(values, weights) -> the scale, of either sign, that is best for a part alone."""
    sums, _, _ = _common(parts)
    (low, high), size = parts.codes, parts.size

    @helper
    def fit(values, weights):
        zero = s.splat(s.f32(0))
        peak = signed_peak(values, size)
        turned = l.inverse(peak)
        best = scale = zero
        for start in range(2 * starts.number + 1):
            more = s.f32(starts.first) + s.f32(start // 2) * s.f32(starts.step)
            end = s.f32(high) + more if start % 2 == 1 else s.f32(low) - more
            inverse = turned * s.splat(end)
            if start == 2 * starts.number:
                inverse = l.inverse(scale)
            _, second, mixed = sums(values, weights, inverse, zero)
            d = _ratio(mixed, second)
            better = d * mixed > best
            best, scale = s.select(better, d * mixed, best), s.select(better, d, scale)
        return scale

    return fit


def fit_ranged(parts, starts, shift, signed):
    """(values, weights) -> scale, minimum taken away, sum of w, of w x: best for a part alone.

    signed: whether what is taken away may be negative; shift: how much of the range off it
    is tried as well.
    """
    sums, _, _ = _common(parts)
    nbytes = 64 * parts.size

    @helper
    def fit(values, weights):
        zero = s.splat(s.f32(0))
        weight = mean = zero
        low = high = s.load(values) if signed else zero
        for j in range(0, nbytes, 64):
            x, w = s.load(values + j), s.load(weights + j)
            low, high = s.smaller(x, low), s.larger(x, high)
            weight, mean = weight + w, s.fma(w, x, mean)
        turned = l.inverse(high - low)
        best, scale, minimum = s.splat(s.f32(-_HUGE)), zero, zero - low
        for start in range(3 * starts.number + 1):
            end = s.f32(starts.first) + s.f32(start // 3) * s.f32(starts.step)
            inverse = turned * s.splat(end)
            offset = (high - low) * s.splat(s.f32(start % 3 - 1) * s.f32(shift)) - low
            if start == 3 * starts.number:
                inverse, offset = l.inverse(scale), minimum
            first, second, mixed = sums(values, weights, inverse, offset)
            spread = weight * second - first * first
            d = _ratio(weight * mixed - mean * first, spread)
            m = _ratio(first * mixed - mean * second, spread)
            if not signed:
                alone = m <= zero
                d, m = s.select(alone, _ratio(mixed, second), d), s.select(alone, zero, m)
            gain = d * mixed - m * mean
            better = (gain > best) & (d > zero)
            best, scale = s.select(better, gain, best), s.select(better, d, scale)
            minimum = s.select(better, m, minimum)
        return scale, minimum, weight, mean

    return fit


@helper
def signed_peak(values, size):
    """The value of the largest magnitude, the first of several."""
    peak = largest = s.splat(s.f32(0))
    for j in range(0, 64 * size, 64):
        x = s.load(values + j)
        more = l.absolute(x) > largest
        peak, largest = s.select(more, x, peak), s.select(more, l.absolute(x), largest)
    return peak


def alone_centred(parts, starts):
    """(values, weights, bases): blocks of one part with a float16 scale."""
    fit, (_, _, put_codes) = fit_centred(parts, starts), _common(parts)

    @helper
    def block(values, weights, bases):
        d = fit(values, weights)
        put_codes(values, l.as_half(d), s.splat(s.f32(0)))
        l.store_ints(bases, l.half_bits(d))

    return block


def alone_ranged(parts, starts, shift):
    """(values, weights, bases): blocks of one part with a float16 scale and minimum."""
    fit, (_, _, put_codes) = fit_ranged(parts, starts, shift, True), _common(parts)

    @helper
    def block(values, weights, bases):
        d, m, _, _ = fit(values, weights)
        m = s.splat(s.f32(0)) - m
        put_codes(values, l.as_half(d), s.splat(s.f32(0)) - l.as_half(m))
        l.store_ints(bases, l.half_bits(d))
        l.store_ints(bases + 64, l.half_bits(m))

    return block


def centred(parts, starts, turns, reach):
    """(values, weights, bases, scales, minima): value = d * step * code.

    reach: how many steps off its neighbours are; minima are left alone.
    """
    fit, (sums, error, put_codes) = fit_centred(parts, starts), _common(parts)
    size, all_parts, (low, high) = 64 * parts.size, 64 * parts.number, parts.steps

    @helper
    def nearest_steps(values, weights, scales, d):
        """Each part takes the best steps near by; error, and the sums that d follows from."""
        zero = s.splat(s.f32(0))
        total = upper = lower = zero
        for at in range(0, all_parts, 64):
            x, w = values + at // 64 * size, weights + at // 64 * size
            least, own = s.splat(s.f32(_HUGE)), s.load(scales + at)
            best = own
            for k in range(-reach, reach + 1):
                step = l.code(own + s.splat(s.f32(k)), s.f32(low), s.f32(high))
                off = error(x, w, d * step, zero)
                better = off < least
                least, best = s.select(better, off, least), s.select(better, step, best)
            s.store(scales + at, best)
            _, second, mixed = sums(x, w, l.inverse(d * best), zero)
            total = total + least
            upper, lower = s.fma(best, mixed, upper), s.fma(best * best, second, lower)
        return total, _ratio(upper, lower)

    @helper
    def block(values, weights, bases, scales, minima):
        mine, kept = _mine(), _kept()
        for at in range(0, all_parts, 64):
            s.store(mine + at, fit(values + at // 64 * size, weights + at // 64 * size))
        d = l.as_half(signed_peak(mine, parts.number) / s.splat(s.f32(low)))
        for at in range(0, all_parts, 64):
            step = l.code(s.load(mine + at) * l.inverse(d), s.f32(low), s.f32(high))
            s.store(mine + at, step)
        least, best = s.splat(s.f32(_HUGE)), d
        for _ in range(turns):
            total, fitted = nearest_steps(values, weights, mine, d)
            better = total < least
            least, best = s.select(better, total, least), s.select(better, d, best)
            _swap(better, mine, kept, all_parts)
            d = l.as_half(fitted)
        for at in range(0, all_parts, 64):
            step = s.load(kept + at)
            put_codes(values + at // 64 * size, best * step, s.splat(s.f32(0)))
            l.store_ints(scales + at, l.truncated(step))
        l.store_ints(bases, l.half_bits(best))

    return block


def ranged(parts, starts, shift, turns):
    """(values, weights, bases, scales, minima): value = d * step * code - m * its other step."""
    fit, (sums, error, put_codes) = fit_ranged(parts, starts, shift, False), _common(parts)
    size, all_parts, high = 64 * parts.size, 64 * parts.number, parts.steps[1]

    @helper
    def nearest_steps(values, weights, mine, d, m):
        """Each part takes the best steps near by; error, and what d and m should be."""
        zero = s.splat(s.f32(0))
        total = a = b = c = u = v = zero
        for at in range(0, all_parts, 64):
            x, w = values + at // 64 * size, weights + at // 64 * size
            least = s.splat(s.f32(_HUGE))
            own, other = s.load(mine + at), s.load(mine + _SECOND + at)
            best, second_best = own, other
            for k in range(9):
                step = l.code(own + s.splat(s.f32(k // 3 - 1)), s.f32(0), s.f32(high))
                second_step = l.code(other + s.splat(s.f32(k % 3 - 1)), s.f32(0), s.f32(high))
                off = error(x, w, d * step, m * second_step)
                better = off < least
                least, best = s.select(better, off, least), s.select(better, step, best)
                second_best = s.select(better, second_step, second_best)
            s.store(mine + at, best)
            s.store(mine + _SECOND + at, second_best)
            first, second, mixed = sums(x, w, l.inverse(d * best), m * second_best)
            total = total + least
            a, b = s.fma(best * best, second, a), s.fma(best * second_best, first, b)
            c = s.fma(second_best * second_best, s.load(mine + _WEIGHT + at), c)
            u = s.fma(best, mixed, u)
            v = s.fma(second_best, s.load(mine + _MEAN + at), v)
        # d a - m b = u and d b - m c = v; with an m below 0 the old one stays
        fitted, taken = _ratio(u * c - v * b, a * c - b * b), _ratio(u * b - v * a, a * c - b * b)
        apart = (fitted > zero) & (taken >= zero)
        d = l.as_half(s.select(apart, fitted, _ratio(u + m * b, a)))
        return total, d, l.as_half(s.larger(_ratio(d * b - v, c), zero))

    @helper
    def block(values, weights, bases, scales, minima):
        mine, kept, highest = _mine(), _kept(), s.splat(s.f32(high))
        d = m = s.splat(s.f32(0))
        for at in range(0, all_parts, 64):
            x, w = values + at // 64 * size, weights + at // 64 * size
            scale, minimum, weight, mean = fit(x, w)
            s.store(mine + at, scale)
            s.store(mine + _SECOND + at, minimum)
            s.store(mine + _WEIGHT + at, weight)
            s.store(mine + _MEAN + at, mean)
            d, m = s.larger(scale, d), s.larger(minimum, m)
        d, m = l.as_half(d / highest), l.as_half(m / highest)
        for at in range(0, all_parts, 64):
            second = mine + _SECOND + at
            s.store(mine + at, l.code(s.load(mine + at) * l.inverse(d), s.f32(0), s.f32(high)))
            s.store(second, l.code(s.load(second) * l.inverse(m), s.f32(0), s.f32(high)))
        least, best_d, best_m = s.splat(s.f32(_HUGE)), d, m
        for _ in range(turns):
            total, next_d, next_m = nearest_steps(values, weights, mine, d, m)
            better = total < least
            least, best_d = s.select(better, total, least), s.select(better, d, best_d)
            best_m = s.select(better, m, best_m)
            _swap(better, mine, kept, 64 * (_PARTS + parts.number))
            d, m = next_d, next_m
        for at in range(0, all_parts, 64):
            step, second_step = s.load(kept + at), s.load(kept + _SECOND + at)
            put_codes(values + at // 64 * size, best_d * step, best_m * second_step)
            l.store_ints(scales + at, l.truncated(step))
            l.store_ints(minima + at, l.truncated(second_step))
        l.store_ints(bases, l.half_bits(best_d))
        l.store_ints(bases + 64, l.half_bits(best_m))

    return block
