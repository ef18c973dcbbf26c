"""Sixteen blocks side by side: lane i of a vector belongs to block i, vector j to its element j.

So what is chosen for each block, scales and codes, is chosen for sixteen without adding up lanes.
Blocks lie behind one another in rows; a group at the end has its last block several times.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

from . import emit as e
from . import simd as s
from .rows import helper

LANES = e.LANES


def room(nbytes):
    """() -> address of `nbytes` of the thread's own memory, at a cache line."""

    @s.operation(s.i64)
    def address(b):
        with b.goto_entry_block():
            slot = b.alloca(ir.ArrayType(e.i8, nbytes))
            slot.align = 64
            return b.ptrtoint(slot, e.i64)

    return address


def _transposed(b, vectors):
    """16 vectors of 16: element i of vector j becomes element j of vector i."""
    half = e.LANES // 2
    low = [lane // 2 + lane % 2 * e.LANES for lane in range(e.LANES)]
    high = [lane + half for lane in low]
    picked = [ir.Constant(e.wide(e.i32), lanes) for lanes in (low, high)]
    for _ in range(4):  # a shuffle of cards: each deals one bit of the place to the other side
        pairs = zip(vectors[:half], vectors[half:], strict=True)
        vectors = [b.shuffle_vector(x, y, lanes) for x, y in pairs for lanes in picked]
    return vectors


def loader(size, periodic=False):
    """(source, block, n_blocks, target, n_columns): 16 blocks of `size` floats, element by element.

    n_blocks: behind the last one comes the last one. periodic: source is one row, of all rows.
    """

    @s.operation(s.void, s.i64, s.i64, s.i64, s.i64, s.i64)
    def load(b, source, block, n_blocks, target, n_columns):
        last, nbytes = b.sub(n_blocks, e.number(1)), e.number(4 * size)
        rows = []
        for lane in range(LANES):
            at = e.offset(b, block, lane)
            at = b.mul(b.select(b.icmp_signed("<", at, last), at, last), nbytes)
            if periodic:
                at = b.urem(at, b.mul(n_columns, e.number(4)))
            rows.append(b.add(source, at))
        with cgutils.for_range_slice(b, e.number(0), nbytes, e.number(64), e.i64) as (at, _):
            values = [e.load(b, b.add(row, at), e.wide(e.f32), 4) for row in rows]
            to = b.add(target, b.mul(at, e.number(LANES)))
            for j, column in enumerate(_transposed(b, values)):
                e.store(b, column, e.offset(b, to, 64 * j), 64)

    return load


@s.operation(s.i32x16, s.i64)
def load_ints(b, address):
    """16 int32."""
    return e.load(b, address, e.wide(e.i32), 64)


@s.operation(s.void, s.i64, s.i32x16)
def store_ints(b, address, value):
    """16 int32."""
    e.store(b, value, address, 64)


absolute = s.operation(s.f32x16, s.f32x16)(e.absolute)
floats = s.operation(s.f32x16, s.i32x16)(lambda b, x: b.sitofp(x, e.wide(e.f32)))
truncated = s.operation(s.i32x16, s.f32x16)(lambda b, x: b.fptosi(x, e.wide(e.i32)))
bits_of = s.operation(s.i32x16, s.f32x16)(lambda b, x: b.bitcast(x, e.wide(e.i32)))

floats_of = s.operation(s.f32x16, s.i32x16)(lambda b, x: b.bitcast(x, e.wide(e.f32)))


@s.operation(s.i32x16, s.i32x16, s.i64)
def shifted(b, value, n):
    """Lanes shifted n bits up."""
    return b.shl(value, e.splat(b, b.trunc(n, e.i32)))


@s.operation(s.i32x16, s.i32x16, s.i64)
def dropped(b, value, n):
    """Lanes without their lowest n bits, which are shifted out; lanes are not below 0."""
    return b.lshr(value, e.splat(b, b.trunc(n, e.i32)))


def _half(b, x):
    """The nearest float16 that is finite."""
    x = e.smaller(b, e.larger(b, x, e.floats(-65504.0)), e.floats(65504.0))
    return e.float_to_half(b, x, s.HALVES)


half_bits = s.operation(s.i32x16, s.f32x16)(lambda b, x: b.zext(_half(b, x), e.wide(e.i32)))
as_half = s.operation(s.f32x16, s.f32x16)(lambda b, x: e.half_to_float(b, _half(b, x), s.HALVES))


@s.operation(s.f32x16, s.f32x16, s.f32, s.f32)
def code(b, x, low, high):
    """The nearest whole number from low to high, halves to even; low for NaN."""
    x = e.smaller(b, e.larger(b, x, e.splat(b, low)), e.splat(b, high))
    return e.nearest(b, x)


@s.operation(s.i32x16, s.f32x16)
def half_away(b, x):
    """The nearest whole number, halves away from zero; |x| < 2^31."""
    whole = b.fptosi(x, e.wide(e.i32))
    far = b.fcmp_ordered(">=", e.absolute(b, b.fsub(x, b.sitofp(whole, x.type))), e.floats(0.5))
    one = b.or_(b.ashr(b.bitcast(x, e.wide(e.i32)), e.ints(31)), e.ints(1))  # with the sign of x
    return b.add(whole, b.select(far, one, e.ints(0)))


@helper
def inverse(d):
    """1 / d, and 0 where d is 0 or so small that 1 / d is none."""
    one = s.splat(s.f32(1))
    return s.select(absolute(d) > s.splat(s.f32(3e-39)), one / d, s.splat(s.f32(0)))
