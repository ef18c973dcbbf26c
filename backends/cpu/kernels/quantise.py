"""A block of 32 activations as int8 with one scale, rounded better than by max|x| / 127 alone.

Four scales, `STRETCHES` times max|x| / 127, are tried: the least of four sums of squared errors is
an eighth below their mean. The scale stored is then the best one for the codes, sum(x q) /
sum(q^2). `tests/tile_reference.py` says the same in numpy.
"""

from __future__ import annotations

from llvmlite import ir

from runtime.backends.cpu.tile.spec import STRETCHES

from . import emit as e
from . import simd as s

_SMALLEST = 1e-30  # below it 1/d could overflow and d lose its bits
_ROUND = e.floats(12582912.0)  # 1.5 * 2^23: added, it leaves the nearest integer in the low bits
_ROUND_BITS = e.ints(0x4B400000)


def _float(value):
    return ir.Constant(e.f32, e.single(value))


def _rounded(b, part, inverse):
    """part * inverse to the nearest even, as _ROUND plus an integer."""
    return e.fma(b, part, inverse, _ROUND, s.FUSED)


def _error(b, parts, d, inverse):
    """Squared errors of both parts, summed lane by lane."""
    error, minus = None, b.fneg(d)
    for part in parts:
        left = e.fma(b, b.fsub(_rounded(b, part, inverse), _ROUND), minus, part, s.FUSED)
        error = b.fmul(left, left) if error is None else e.fma(b, left, left, error, s.FUSED)
    return error


def _folded(b, x, y, width):
    """Halves of every `width` lanes added up: those of x, then those of y, in turn."""
    half = width // 2
    groups = range(0, e.LANES, width)
    low: list[int] = []
    high: list[int] = []
    for source in range(1 if y is None else 2):
        for group in groups:
            start = source * e.LANES + group
            low += range(start, start + half)
            high += range(start + half, start + width)
    count = len(low)
    if count < e.LANES:  # one vector: its sums stand twice
        low, high = low * (e.LANES // count), high * (e.LANES // count)
    kind = ir.Constant(e.wide(e.i32), low), ir.Constant(e.wide(e.i32), high)
    other = x if y is None else y
    return b.fadd(*(b.shuffle_vector(x, other, picked) for picked in kind))


def _totals(b, vectors):
    """The sums of two or four vectors, in lanes 0, 1 (2, 3) and again behind them.

    Lanes are added as in a single sum: i and i + 8, then i + 4, i + 2, i + 1.
    """
    width = e.LANES
    while width > 1:
        if len(vectors) > 1:
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [_folded(b, x, y, width) for x, y in pairs]
        else:
            vectors = [_folded(b, vectors[0], None, width)]
        width //= 2
    return vectors[0]


def _least_of_four(b, totals):
    """Which of lanes 0..3 (repeated in all others) is the least, in every lane.

    Sums of squares are ordered as their bits are; the two lowest make way for the lane's number.
    """
    numbers = ir.Constant(e.wide(e.i32), [lane % 4 for lane in range(e.LANES)])
    keys = b.or_(b.and_(b.bitcast(totals, e.wide(e.i32)), e.ints(-4)), numbers)
    for apart in (1, 2):
        other = e.lanes_of(b, keys, [lane ^ apart for lane in range(e.LANES)])
        keys = b.select(b.icmp_signed("<", keys, other), keys, other)
    return b.and_(keys, e.ints(3))


def _picked(b, number, values):
    """values[number], lane by lane."""
    result = e.floats(values[0])
    for i, value in enumerate(values[1:], 1):
        result = b.select(b.icmp_signed("==", number, e.ints(i)), e.floats(value), result)
    return result


def _best_inverse(b, parts, finest, inverse):
    """1 / scale, in every lane, for the scale of STRETCHES * finest that rounds best."""
    wide, turned = e.splat(b, finest), e.splat(b, inverse)
    back = [1 / stretch for stretch in STRETCHES]
    errors = [
        _error(b, parts, b.fmul(wide, e.floats(by)), b.fmul(turned, e.floats(under)))
        for by, under in zip(STRETCHES, back, strict=True)
    ]
    return b.fmul(turned, _picked(b, _least_of_four(b, _totals(b, errors)), back))


def _fitted(b, parts, rounded, finest):
    """The scale with the least squared error for these codes; `finest` where all are zero."""
    q = [b.fsub(r, _ROUND) for r in rounded]
    products, squares = b.fmul(parts[0], q[0]), b.fmul(q[0], q[0])
    products = e.fma(b, parts[1], q[1], products, s.FUSED)
    squares = e.fma(b, q[1], q[1], squares, s.FUSED)
    totals = _totals(b, [products, squares])
    product, square = (b.extract_element(totals, ir.Constant(e.i32, i)) for i in (0, 1))
    return b.select(b.fcmp_ordered(">", square, _float(0.0)), b.fdiv(product, square), finest)


def _sum_of_bytes(b, q):
    """Sum of 16 int8; unsigned ones are a single instruction to add up on x86."""
    positive = b.xor(q, ir.Constant(q.type, [128] * e.LANES))
    wide = b.zext(positive, e.wide(e.i32))
    total = e.intrinsic_call(b, "llvm.vector.reduce.add.v16i32", e.i32, [wide])
    return b.sub(total, ir.Constant(e.i32, 128 * e.LANES))


@s.operation(s.void, s.f32x16, s.f32x16, s.i64, s.i64, s.i64)
def quantise(b, low, high, quants, side, column_bytes):
    """One block of 32 values to int8 with its side data; `column_bytes` = 4 * C."""
    parts = low, high
    peak = e.largest(b, e.larger(b, e.absolute(b, low), e.absolute(b, high)))
    empty, zero = b.fcmp_unordered("<", peak, _float(_SMALLEST)), _float(0.0)
    finest = b.fdiv(peak, _float(127.0))
    inverse = b.select(empty, zero, b.fdiv(_float(127.0), b.select(empty, _float(1.0), peak)))
    best = _best_inverse(b, parts, finest, inverse)
    rounded = [_rounded(b, part, best) for part in parts]
    d = b.select(empty, zero, _fitted(b, parts, rounded, finest))
    sums = []
    for i, value in enumerate(rounded):
        q = b.trunc(b.sub(b.bitcast(value, e.wide(e.i32)), _ROUND_BITS), e.wide(e.i8))
        sums.append(_sum_of_bytes(b, q))
        e.store(b, q, e.offset(b, quants, 16 * i), 1)
    whole = b.add(*sums)
    rows = [d, b.fmul(d, b.sitofp(whole, e.f32))]
    rows += [b.mul(v, ir.Constant(e.i32, -8)) for v in (whole, *sums)]
    for i, value in enumerate(rows):
        e.store(b, value, b.add(side, b.mul(column_bytes, ir.Constant(e.i64, i))), 4)
