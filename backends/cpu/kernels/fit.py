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
# Of scales as good as each other the first stays, which has the widest codes: errors that are less
# by no more than a share of them, or of what they were before the fit, are alike.
_SHARE, _BEFORE = 1e-4, 1e-6
_PARTS = 16  # at most
_mine, _kept = l.room(3 * 64 * _PARTS), l.room(2 * 64 * _PARTS)
_SECOND, _WEIGHT = (i * 64 * _PARTS for i in (1, 2))


class Parts(NamedTuple):
    """`number` parts of `size` values; codes and steps of scales from their lowest to highest."""

    number: int
    size: int
    codes: tuple[int, int]
    steps: tuple[int, int] = (0, 0)


class Starts(NamedTuple):
    """Scales to try, the smallest first: `first`, `first + step`, .. codes for the whole range.

    Of centred codes: for the largest value, as many more than there are.
    """

    first: float
    step: float
    number: int


@helper
def _ratio(x, y):
    """x / y, and 0 where y is not above 0."""
    zero = s.splat(s.f32(0))
    return s.select(y > zero, x / y, zero)


@helper
def _clearly_less(left, least, before):
    return s.fma(before, s.splat(s.f32(_BEFORE)), left) < least * s.splat(s.f32(1 - _SHARE))


@helper
def _swap(better, source, target, nbytes):
    """Vectors at source to target, in the lanes that say so."""
    for i in range(0, nbytes, 64):
        s.store(target + i, s.select(better, s.load(source + i), s.load(target + i)))


def _common(parts):
    """(error, sums, put_codes) of a part with the nearest codes of (x + offset) / scale."""
    nbytes, (low, high) = 64 * parts.size, parts.codes

    @helper
    def error(values, weights, scale, offset):
        """Sum of w left^2, where scale * code leaves `left` of x + offset."""
        total, inverse = s.splat(s.f32(0)), l.inverse(scale)
        for j in range(0, nbytes, 64):
            y = s.load(values + j) + offset
            left = y - l.code(y * inverse, s.f32(low), s.f32(high)) * scale
            total = s.fma(s.load(weights + j) * left, left, total)
        return total

    @helper
    def sums(values, weights, scale, offset):
        """Of w code, w code^2, w code left, w left and w left^2: small numbers, so exact ones."""
        first = second = mixed = rest = total = s.splat(s.f32(0))
        inverse = l.inverse(scale)
        for j in range(0, nbytes, 64):
            y, w = s.load(values + j) + offset, s.load(weights + j)
            q = l.code(y * inverse, s.f32(low), s.f32(high))
            left, wq = y - q * scale, w * q
            first, second, mixed = first + wq, s.fma(wq, q, second), s.fma(wq, left, mixed)
            rest, total = s.fma(w, left, rest), s.fma(w * left, left, total)
        return first, second, mixed, rest, total

    @helper
    def put_codes(values, scale, offset):
        """Codes, counted from the lowest."""
        inverse = l.inverse(scale)
        for j in range(0, nbytes, 64):
            y = (s.load(values + j) + offset) * inverse
            q = l.code(y, s.f32(low), s.f32(high)) - s.splat(s.f32(low))
            l.store_ints(values + j, l.truncated(q))

    return error, sums, put_codes


def fit_centred(parts, starts):
    """(values, weights) -> the scale, of either sign, that is best for a part alone."""
    _, sums, _ = _common(parts)
    (low, high), size = parts.codes, parts.size

    @helper
    def fit(values, weights):
        zero = s.splat(s.f32(0))
        peak = signed_peak(values, size)
        least, best = s.splat(s.f32(_HUGE)), zero
        for start in range(2 * starts.number + 1):
            more = s.f32(starts.first) + s.f32(start // 2) * s.f32(starts.step)
            end = s.f32(high) + more if start % 2 == 1 else s.f32(low) - more
            scale = peak * s.splat(s.f32(1) / end)
            if start == 2 * starts.number:
                scale = best
            _, second, mixed, _, total = sums(values, weights, scale, zero)
            change = _ratio(mixed, second)
            left = total - change * mixed
            better = _clearly_less(left, least, total)
            least, best = s.select(better, left, least), s.select(better, scale + change, best)
        return best

    return fit


def fit_ranged(parts, starts, shift, signed):
    """(values, weights) -> scale, minimum taken away, sum of w: best for a part alone.

    signed: whether what is taken away may be negative; shift: how much of the range off it
    is tried as well.
    """
    _, sums, _ = _common(parts)
    nbytes = 64 * parts.size

    @helper
    def fit(values, weights):
        zero = s.splat(s.f32(0))
        weight = zero
        high = s.load(values)
        low = high if signed else zero
        for j in range(0, nbytes, 64):
            x = s.load(values + j)
            low, high = s.smaller(x, low), s.larger(x, high)
            weight = weight + s.load(weights + j)
        least, best, minimum = s.splat(s.f32(_HUGE)), zero, zero - low
        for start in range(3 * starts.number + 1):
            end = s.f32(starts.first) + s.f32(start // 3) * s.f32(starts.step)
            side = (start + 1) % 3 - 1
            scale = (high - low) * s.splat(s.f32(1) / end)
            offset = (high - low) * s.splat(s.f32(side) * s.f32(shift)) - low
            if start == 3 * starts.number:
                scale, offset = best, minimum
            first, second, mixed, rest, total = sums(values, weights, scale, offset)
            spread = weight * second - first * first
            change = _ratio(weight * mixed - rest * first, spread)
            added = _ratio(first * mixed - rest * second, spread)
            left = total - change * mixed + added * rest
            if not signed:
                # a minimum above 0 is left alone, and the scale is fitted for itself
                without = mixed - offset * first
                alone = offset + added < zero
                turned = _ratio(without, second)
                unmoved = total - (rest + rest) * offset + weight * (offset * offset)
                left = s.select(alone, unmoved - turned * without, left)
                change = s.select(alone, turned, change)
                added = s.select(alone, zero - offset, added)
            better = _clearly_less(left, least, total)
            least, best = s.select(better, left, least), s.select(better, scale + change, best)
            minimum = s.select(better, offset + added, minimum)
        return best, minimum, weight

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
        d, m, _ = fit(values, weights)
        m = s.splat(s.f32(0)) - m
        put_codes(values, l.as_half(d), s.splat(s.f32(0)) - l.as_half(m))
        l.store_ints(bases, l.half_bits(d))
        l.store_ints(bases + 64, l.half_bits(m))

    return block


def centred(parts, starts, turns, reach):
    """(values, weights, bases, scales, minima): value = d * step * code.

    reach: how many steps off its neighbours are; minima are left alone.
    """
    fit, (error, sums, put_codes) = fit_centred(parts, starts), _common(parts)
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
            _, second, mixed, _, left = sums(x, w, d * best, zero)
            total = total + left
            upper, lower = s.fma(best, mixed, upper), s.fma(best * best, second, lower)
        return total, d + _ratio(upper, lower)

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
    fit, (error, sums, put_codes) = fit_ranged(parts, starts, shift, False), _common(parts)
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
            first, second, mixed, rest, left = sums(x, w, d * best, m * second_best)
            total = total + left
            a, b = s.fma(best * best, second, a), s.fma(best * second_best, first, b)
            c = s.fma(second_best * second_best, s.load(mine + _WEIGHT + at), c)
            u, v = s.fma(best, mixed, u), s.fma(second_best, rest, v)
        # with changes p of d and q of m: p a - q b = u and p b - q c = v
        change = _ratio(u * c - v * b, a * c - b * b)
        apart = (d + change > zero) & (m + _ratio(u * b - v * a, a * c - b * b) >= zero)
        fitted = l.as_half(d + s.select(apart, change, _ratio(u, a)))
        return total, fitted, l.as_half(s.larger(m + _ratio((fitted - d) * b - v, c), zero))

    @helper
    def block(values, weights, bases, scales, minima):
        mine, kept, highest = _mine(), _kept(), s.splat(s.f32(high))
        d = m = s.splat(s.f32(0))
        for at in range(0, all_parts, 64):
            x, w = values + at // 64 * size, weights + at // 64 * size
            scale, minimum, weight = fit(x, w)
            s.store(mine + at, scale)
            s.store(mine + _SECOND + at, minimum)
            s.store(mine + _WEIGHT + at, weight)
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
