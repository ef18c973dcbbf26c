"""Blocks of 32 activations as int8 with one scale, rounded better than by max|x| / 127 alone.

Four scales, `STRETCHES` times max|x| / 127, are tried: the least of four sums of squared errors is
an eighth below their mean. The scale stored is then the best one for the codes, sum(x q) /
sum(q^2). `tests/tile_reference.py` says the same in numpy.

Several blocks are rounded side by side: what is one number of a block is a lane of a vector, lane i
for block i modulo their number, and sums over lanes are made of all of them together.
"""

from __future__ import annotations

from llvmlite import ir

from runtime.backends.cpu.tile.spec import Q_BYTES, SIDE_BYTES, STRETCHES

from . import emit as e
from . import simd as s

_SMALLEST = 1e-30  # below it 1/d could overflow and d lose its bits
_ROUND = e.floats(12582912.0)  # 1.5 * 2^23: added, it leaves the nearest integer in the low bits
_ROUND_BITS = e.ints(0x4B400000)


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


def _folded(b, x, y, width, join):
    """Halves of every `width` lanes joined: those of x, then those of y, in turn."""
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
    return join(*(b.shuffle_vector(x, other, picked) for picked in kind))


def _totals(b, vectors, join):
    """The lanes of 1, 2, 4, 8 or 16 vectors joined, in a lane each and again behind them.

    Lanes are joined as those of a single vector: i and i + 8, then i + 4, i + 2, i + 1.
    """
    width = e.LANES
    while width > 1:
        if len(vectors) > 1:
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [_folded(b, x, y, width, join) for x, y in pairs]
        else:
            vectors = [_folded(b, vectors[0], None, width, join)]
        width //= 2
    return vectors[0]


def _every(b, vector, first, step, count):
    """Lanes first, first + step, .. of `count`, and again behind them."""
    return e.lanes_of(b, vector, [first + step * (i % count) for i in range(e.LANES)])


def _least_of_four(b, totals):
    """Which of every four lanes is the least, in each of the four.

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


def _best_inverses(b, blocks, finest, inverse):
    """1 / scale of each block, for the scale of STRETCHES * finest that rounds best."""
    count, back = len(blocks), [1 / stretch for stretch in STRETCHES]
    errors = []
    for i, parts in enumerate(blocks):
        wide, turned = (_every(b, v, i, 0, 1) for v in (finest, inverse))
        errors += [
            _error(b, parts, b.fmul(wide, e.floats(by)), b.fmul(turned, e.floats(under)))
            for by, under in zip(STRETCHES, back, strict=True)
        ]
    factor = _picked(b, _least_of_four(b, _totals(b, errors, b.fadd)), back)
    return b.fmul(inverse, _every(b, factor, 0, len(STRETCHES), count))


def _fitted(b, blocks, rounded, finest):
    """Scales with the least squared error for these codes; `finest` where all are zero."""
    products, squares = [], []
    for parts, near in zip(blocks, rounded, strict=True):
        q = [b.fsub(r, _ROUND) for r in near]
        product, square = b.fmul(parts[0], q[0]), b.fmul(q[0], q[0])
        products.append(e.fma(b, parts[1], q[1], product, s.FUSED))
        squares.append(e.fma(b, q[1], q[1], square, s.FUSED))
    totals, count = _totals(b, products + squares, b.fadd), len(blocks)
    product, square = (_every(b, totals, first, 1, count) for first in (0, count))
    positive = b.fcmp_ordered(">", square, e.floats(0.0))
    return b.select(positive, b.fdiv(product, square), finest)


def _quantised(b, values, places, column_bytes):
    """Blocks of two vectors of values each to int8 with side data, each at (quants, side)."""
    blocks = [values[i : i + 2] for i in range(0, len(values), 2)]
    sizes = [e.larger(b, *(e.absolute(b, part) for part in parts)) for parts in blocks]
    peak = _totals(b, sizes, lambda low, high: e.larger(b, low, high))
    empty = b.fcmp_unordered("<", peak, e.floats(_SMALLEST))
    finest, zero = b.fdiv(peak, e.floats(127.0)), e.floats(0.0)
    turned = b.fdiv(e.floats(127.0), b.select(empty, e.floats(1.0), peak))
    best = _best_inverses(b, blocks, finest, b.select(empty, zero, turned))
    rounded = [
        [_rounded(b, part, _every(b, best, i, 0, 1)) for part in parts]
        for i, parts in enumerate(blocks)
    ]
    d = b.select(empty, zero, _fitted(b, blocks, rounded, finest))
    codes = [b.sub(b.bitcast(v, e.wide(e.i32)), _ROUND_BITS) for near in rounded for v in near]
    for i, q in enumerate(codes):
        half = e.offset(b, places[i // 2][0], 16 * (i % 2))
        e.store(b, b.trunc(q, e.wide(e.i8)), half, 1)
    sums = _totals(b, codes, b.add)
    halves = [_every(b, sums, first, 2, len(blocks)) for first in (0, 1)]
    whole = b.add(*halves)
    rows = [d, b.fmul(d, b.sitofp(whole, e.wide(e.f32)))]
    rows += [b.mul(v, e.ints(-8)) for v in (whole, *halves)]
    for i, row in enumerate(rows):
        for lane, (_, side) in enumerate(places):
            one = b.extract_element(row, ir.Constant(e.i32, lane))
            e.store(b, one, b.add(side, b.mul(column_bytes, ir.Constant(e.i64, i))), 4)


@s.operation(s.void, s.f32x16, s.f32x16, s.i64, s.i64, s.i64)
def quantise(b, low, high, quants, side, column_bytes):
    """One block of 32 values to int8 with its side data; `column_bytes` = 4 * C."""
    _quantised(b, (low, high), [(quants, side)], column_bytes)


@s.operation(s.void, *[s.f32x16] * 8, s.i64, s.i64, s.i64)
def quantise_four(b, a0, a1, b0, b1, c0, c1, d0, d1, quants, side, column_bytes):
    """Four blocks of a column, one after another, each as `quantise` makes it."""
    values = a0, a1, b0, b1, c0, c1, d0, d1
    columns = b.udiv(column_bytes, ir.Constant(e.i64, 4))
    places = [
        tuple(
            b.add(address, b.mul(columns, ir.Constant(e.i64, nbytes * i)))
            for address, nbytes in ((quants, Q_BYTES), (side, SIDE_BYTES))
        )
        for i in range(4)
    ]
    _quantised(b, values, places, column_bytes)
