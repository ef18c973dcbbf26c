"""How one column of packed activations is made: values from their sources, then one layout.

A source is a pair of helpers (x, i) -> 16 values from element i on, (x, i, n) -> the first n < 16
of them, zeros after; x is a tuple of addresses and factors that only the source understands.
"""

from __future__ import annotations

from llvmlite import ir

from runtime.backends.cpu.tile.spec import STRETCHES

from . import emit as e
from . import simd as s
from .rows import clamped_swiglu, helper

_SMALLEST = 1e-30  # below it 1/d could overflow and d lose its bits


def _store_lane(b, value, address, offset):
    e.store(b, value, b.add(address, offset), 4)


def _sum_of_bytes(b, q):
    """Sum of 16 int8; unsigned ones are a single instruction to add up on x86."""
    positive = b.xor(q, ir.Constant(q.type, [128] * e.LANES))
    wide = b.zext(positive, e.wide(e.i32))
    total = e.intrinsic_call(b, "llvm.vector.reduce.add.v16i32", e.i32, [wide])
    return b.sub(total, ir.Constant(e.i32, 128 * e.LANES))


def _best_scale(b, parts, finest, inverse):
    """Of the scales `finest` * STRETCHES the one that rounds best, and the inverse of it (splat).

    The least of four sums of squared errors is an eighth below their mean; ties go to the first.
    """
    least, best_d, best_inverse = None, finest, e.splat(b, inverse)
    for stretch in STRETCHES:
        d = b.fmul(finest, ir.Constant(e.f32, e.single(stretch)))
        turned = e.splat(b, b.fmul(inverse, ir.Constant(e.f32, e.single(1 / stretch))))
        wide, error = e.splat(b, d), None
        for part in parts:
            left = b.fsub(part, b.fmul(e.nearest(b, b.fmul(part, turned)), wide))
            square = b.fmul(left, left)
            error = square if error is None else b.fadd(error, square)
        total = e.total(b, error)
        if least is None:
            least, best_d, best_inverse = total, d, turned
            continue
        better = b.fcmp_ordered("<", total, least)
        least = b.select(better, total, least)
        best_d = b.select(better, d, best_d)
        best_inverse = b.select(better, turned, best_inverse)
    return best_d, best_inverse


def _fitted(b, parts, inverse, d):
    """The scale with the least squared error for these codes: sum(x q) / sum(q^2)."""
    products = squares = None
    for part in parts:
        q = e.nearest(b, b.fmul(part, inverse))
        product, square = b.fmul(part, q), b.fmul(q, q)
        products = product if products is None else b.fadd(products, product)
        squares = square if squares is None else b.fadd(squares, square)
    whole = e.total(b, squares)
    some = b.fcmp_ordered(">", whole, ir.Constant(e.f32, 0.0))
    return b.select(some, b.fdiv(e.total(b, products), whole), d)


@s.operation(s.void, s.f32x16, s.f32x16, s.i64, s.i64, s.i64)
def quantise(b, low, high, quants, side, column_bytes):
    """One block of 32 values to int8 with its side data; `column_bytes` = 4 * C."""
    peak = e.largest(b, e.larger(b, e.absolute(b, low), e.absolute(b, high)))
    empty = b.fcmp_unordered("<", peak, ir.Constant(e.f32, e.single(_SMALLEST)))
    zero, one = ir.Constant(e.f32, 0.0), ir.Constant(e.f32, 1.0)
    finest = b.select(empty, zero, b.fdiv(peak, ir.Constant(e.f32, 127.0)))
    inverse = b.select(empty, zero, b.fdiv(one, b.select(empty, one, finest)))
    d, inverse = _best_scale(b, (low, high), finest, inverse)
    d = b.select(empty, zero, _fitted(b, (low, high), inverse, d))
    sums = []
    for i, part in enumerate((low, high)):
        q = b.trunc(e.nearest_int(b, b.fmul(part, inverse)), e.wide(e.i8))
        sums.append(_sum_of_bytes(b, q))
        e.store(b, q, e.offset(b, quants, 16 * i), 1)
    whole = b.add(*sums)
    rows = [d, b.fmul(d, b.sitofp(whole, e.f32))]
    rows += [b.mul(v, ir.Constant(e.i32, -8)) for v in (whole, *sums)]
    for i, value in enumerate(rows):
        _store_lane(b, value, side, b.mul(column_bytes, ir.Constant(e.i64, i)))


@s.operation(s.void, s.f32x16, s.i64, s.i64)
def split(b, value, target, piece_bytes):
    """16 values as three bfloat16 pieces, `piece_bytes` apart."""
    for _ in range(3):
        bits = b.and_(b.bitcast(value, e.wide(e.i32)), e.ints(0xFFFF0000))
        piece = b.trunc(b.lshr(bits, e.ints(16)), e.wide(e.i16))
        e.store(b, piece, target, 2)
        value = b.fsub(value, b.bitcast(bits, e.wide(e.f32)))
        target = b.add(target, piece_bytes)


@helper
def plain(x, i):
    return s.load(x[0] + i * 4)


@helper
def plain_part(x, i, n):
    return s.load_part(x[0] + i * 4, n, s.f32(0))


@helper
def normed(x, i):
    value = s.load(x[0] + i * 4) * s.splat(x[2])
    if x[1] != 0:
        value = value * s.load(x[1] + i * 4)
    return value


@helper
def normed_part(x, i, n):
    value = s.load_part(x[0] + i * 4, n, s.f32(0)) * s.splat(x[2])
    if x[1] != 0:
        value = value * s.load_part(x[1] + i * 4, n, s.f32(0))
    return value


@helper
def swiglu(x, i):
    return s.silu(s.load(x[0] + i * 4)) * s.load(x[1] + i * 4)


@helper
def swiglu_part(x, i, n):
    return s.silu(s.load_part(x[0] + i * 4, n, s.f32(0))) * s.load_part(x[1] + i * 4, n, s.f32(0))


@helper
def clamped(x, i):
    gate, up = s.load(x[0] + i * 4), s.load(x[1] + i * 4)
    return clamped_swiglu(gate, up, s.splat(x[2]), s.splat(x[3]))


@helper
def clamped_part(x, i, n):
    gate = s.load_part(x[0] + i * 4, n, s.f32(0))
    up = s.load_part(x[1] + i * 4, n, s.f32(0))
    return clamped_swiglu(gate, up, s.splat(x[2]), s.splat(x[3]))


@helper
def opened(x, i):
    return s.load(x[0] + i * 4) * s.sigmoid(s.load(x[1] + i * 4))


@helper
def gated_norm(x, i):
    value = s.load(x[0] + i * 4) * s.splat(x[3]) * s.load(x[1] + i * 4)
    return value * s.silu(s.load(x[2] + i * 4))


@helper
def no_part(x, i, n):
    return s.splat(s.f32(0))


PLAIN, NORMED = (plain, plain_part), (normed, normed_part)
SWIGLU = {"silu": (swiglu, swiglu_part), "oai": (clamped, clamped_part)}
# Heads are whole units: nothing is ever left over.
OPENED, GATED_NORM = (opened, no_part), (gated_norm, no_part)


def column_packer(C, kind, source):
    """(filled, x, tile, column, first, last, n): units first..last-1 of one column."""
    value, value_part = source

    @helper
    def int8_column(filled, x, tile, column, first, last, n):
        quants = tile + column * 32
        side = tile + n * C + column * 4
        zero = s.splat(s.f32(0))
        for unit in range(first, last):
            low, high = zero, zero
            if filled:
                low = value(x, unit * 32)
                high = value(x, unit * 32 + 16)
            quantise(low, high, quants + unit * (32 * C), side + unit * (20 * C), 4 * C)

    @helper
    def f32_column(filled, x, tile, column, first, last, n):
        for unit in range(first, last):
            i = unit * 16
            count = min(16, n - i)
            v = s.splat(s.f32(0))
            if filled:
                v = value(x, i) if count == 16 else value_part(x, i, count)
            target = tile + (i * C + column) * 4
            if C == 1 and count == 16:
                s.store(target, v)
            else:
                s.scatter(target, v, 4 * C, count)

    @helper
    def split_column(filled, x, tile, column, first, last, n):
        zero = s.splat(s.f32(0))
        for unit in range(first, last):
            low, high = zero, zero
            if filled:
                low = value(x, unit * 32)
                high = value(x, unit * 32 + 16)
            target = tile + unit * (192 * C) + column * 64
            split(low, target, 64 * C)
            split(high, target + 32, 64 * C)

    return {"int8": int8_column, "split": split_column, "f32": f32_column}[kind]


UNITS = {"int8": 32, "split": 32, "f32": 16}  # values of a unit of work


def layout(C, kind):
    """Helpers (n -> units of a tile), (n -> bytes of a tile), (at, last, units -> piece)."""
    unit, each = {"int8": (32, 52), "split": (32, 192), "f32": (1, 4)}[kind]
    bytes_per_unit = each * C

    @helper
    def units_of(n):
        return (n + 15) // 16 if kind == "f32" else n // 32

    @helper
    def tile_bytes(n):
        return (n // unit * bytes_per_unit + 63) // 64 * 64

    @helper
    def piece(at, last, units):
        tile = at // units
        first = at - tile * units
        return tile, first, min(units, first + last - at)

    return units_of, tile_bytes, piece
