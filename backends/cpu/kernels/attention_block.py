"""The state of a block of 8 query rows of attention, and its softmax arithmetic.

q lies as [dim][8] and o as [dims / 16][8][16], so that a pass finds all its rows at constant
distances from one address. What codes are multiplied with (kv_dots.py) takes the same room.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from runtime.backends.cpu.abi import ATTENTION_ROWS
from runtime.ops.kv_formats import GROUP, PAGE, Coding, KVFormat

from . import emit as e
from . import simd as s
from .emit import number, times
from .kv_dots import Numbers, folded

ROW_BYTES = 4 * ATTENTION_ROWS  # of one dim of q


class Block:
    """Byte offsets in the state of a block of 8 rows; sizes.py gives its size."""

    places, lowest, highest, sources, targets = 0, 32, 40, 64, 128
    peak, decay, sums, scores, q = 192, 256, 320, 832, 1856


def repeat(
    b: ir.IRBuilder, start: Any, stop: Any, step: int, carried: Sequence[Any], body: Callable
) -> list[Any]:
    """carried = body(i, carried) for i in start, start + step, .. < stop; at least once."""
    before, loop, after = b.block, b.append_basic_block("loop"), b.append_basic_block("after")
    b.branch(loop)
    b.position_at_end(loop)
    i = b.phi(e.i64)
    i.add_incoming(start, before)
    values = [b.phi(value.type) for value in carried]
    results = body(i, values)
    following = b.add(i, number(step))
    i.add_incoming(following, b.block)
    for phi, first, result in zip(values, carried, results, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(result, b.block)
    b.cbranch(b.icmp_signed("<", following, stop), loop, after)
    b.position_at_end(after)
    return results


def repeat_if_any(b: ir.IRBuilder, start: Any, stop: Any, step: int, body: Callable) -> None:
    """body(i) for i in range(start, stop, step), where that may be empty."""

    def once(i, _):
        body(i)
        return []

    with b.if_then(b.icmp_signed("<", start, stop)):
        repeat(b, start, stop, step, [], once)


@s.operation(s.f32x16, s.i64)
def row_peaks(b, scores):
    """Lane r: the largest of the 32 scores of row r, for the 8 rows of a block."""
    rows = []
    for r in range(ATTENTION_ROWS):
        halves = (e.offset(b, scores, 4 * (r * PAGE + h * e.LANES)) for h in (0, 1))
        rows.append(e.larger(b, *(e.load(b, at, e.wide(e.f32), 4) for at in halves)))
    return folded(b, rows, lambda x, y: e.larger(b, x, y))


# 2^r on [-1/2, 1/2]: the polynomial of degree 5 with constant term 1 and the least relative error
# (9.2e-8), fitted for this file.
_EXP2 = [
    0.0013264724229634464,
    0.009671513244537676,
    0.0555073375684232,
    0.24022242074640174,
    0.6931469775880089,
    1.0,
]


@s.operation(s.f32x16, s.f32x16)
def exp2_negative(b, x):
    """2^x of lanes <= 0 within 2 ulp; 0 below -126.5, 1 at 0, NaN stays NaN."""
    x = e.larger(b, e.floats(-127.0), x)
    shifted = b.fadd(x, e.floats(12582912.0))  # 1.5 * 2^23: the nearest integer in the low bits
    r = b.fsub(x, b.fsub(shifted, e.floats(12582912.0)))
    exponent = b.shl(b.add(b.bitcast(shifted, e.wide(e.i32)), e.ints(127)), e.ints(23))
    return b.fmul(e.horner(b, r, _EXP2, s.FUSED), b.bitcast(exponent, e.wide(e.f32)))


# (tanh(x) / x - 1) / x^2 in powers of x^2 on |x| <= 0.7: relative error of tanh 1.4e-8, fitted
# for this file.
_TANH = [-0.0051551, 0.02011164, -0.05356698, 0.13329243, -0.33333197]


@s.operation(s.f32x16, s.f32x16)
def tanh(b, x):
    """Hyperbolic tangent of lanes within 2 ulp, NaN stays NaN."""
    square = b.fmul(x, x)
    cubic = b.fmul(e.horner(b, square, _TANH, s.FUSED), square)
    small = e.fma(b, cubic, x, x, s.FUSED)
    power = e.exp(b, b.fmul(e.absolute(b, x), e.floats(2.0)), s.FUSED)
    large = b.fsub(e.floats(1.0), b.fdiv(e.floats(2.0), b.fadd(power, e.floats(1.0))))
    sign = b.and_(b.bitcast(x, e.wide(e.i32)), e.ints(0x80000000))
    large = b.bitcast(b.or_(b.bitcast(large, e.wide(e.i32)), sign), e.wide(e.f32))
    return b.select(b.fcmp_ordered("<", square, e.floats(0.49)), small, large)


def block_beginning(format: KVFormat) -> Any:
    """(block, rows, k_dim, k_room, v_room, factor): the start of a block for that type of K.

    Its `rows` have places, sources and peaks; lowest and highest place, q and o = 0 are made. q,
    times `factor`, is floats [k_dim to a whole 16][8], zero from k_dim on, of which rows that are
    missing repeat the first; or, where K is codes, integers by group (kv_dots.py).
    """

    @s.operation(s.void, s.i64, s.i64, s.i64, s.i64, s.i64, s.f32)
    def begin(b, block, rows, k_dim, k_room, v_room, factor):
        sources = _places_and_sources(b, block, rows)
        q = e.offset(b, block, Block.q)
        coding = format.coding
        if coding is None:
            _gather(b, sources, q, k_dim, factor)
        else:
            repeat_if_any(
                b, number(0), rows, 1,
                lambda row: _as_integers(b, coding, block, row, k_dim, factor),
            )  # fmt: skip
        o = b.add(q, times(b, k_room, ROW_BYTES))

        def clear(dim):
            for r in range(ATTENTION_ROWS):
                at = e.offset(b, b.add(o, times(b, dim, ROW_BYTES)), 4 * e.LANES * r)
                e.store(b, e.floats(0.0), at, 4)

        repeat_if_any(b, number(0), v_room, e.LANES, clear)

    return begin


def _as_integers(
    b: ir.IRBuilder, coding: Coding, block: Any, row: Any, k_dim: Any, factor: Any
) -> None:
    source = e.load(b, b.add(e.offset(b, block, Block.sources), times(b, row, 8)), e.i64, 8)
    q = e.offset(b, block, Block.q)

    def group(dim):
        low, high = (_some(b, source, b.add(dim, number(i)), k_dim) for i in (0, e.LANES))
        numbers = Numbers(b, b.add(q, times(b, dim, ROW_BYTES)), row)
        numbers.store_beside(numbers.store(coding, [(low, high)], factor), 1)

    repeat_if_any(b, number(0), k_dim, GROUP, group)


def _some(b: ir.IRBuilder, source: Any, dim: Any, dims: Any) -> Any:
    """16 floats from `dim` on, zeros behind the last of `dims`."""
    at, left = b.add(source, times(b, dim, 4)), b.sub(dims, dim)
    kind, kept = e.wide(e.f32), cgutils.alloca_once(b, e.wide(e.f32))
    with b.if_else(b.icmp_signed(">=", left, number(e.LANES))) as (whole, part):
        with whole:
            b.store(e.load(b, at, kind, 4), kept)
        with part:
            b.store(e.load_first(b, at, left), kept)
    return b.load(kept)


def _places_and_sources(b: ir.IRBuilder, block: Any, rows: Any) -> list:
    """Addresses of the rows of q; the lowest and the highest place are stored."""
    lowest, highest, sources = _first_row(b, block)
    for r in range(1, ATTENTION_ROWS):
        there = b.icmp_signed("<", number(r), rows)
        place = e.load(b, e.offset(b, block, Block.places + 4 * r), e.i32, 4)
        place = b.select(there, b.sext(place, e.i64), lowest)
        lowest = b.select(b.icmp_signed("<", place, lowest), place, lowest)
        highest = b.select(b.icmp_signed(">", place, highest), place, highest)
        source = e.load(b, e.offset(b, block, Block.sources + 8 * r), e.i64, 8)
        sources.append(b.select(there, source, sources[0]))
    e.store(b, lowest, e.offset(b, block, Block.lowest), 8)
    e.store(b, highest, e.offset(b, block, Block.highest), 8)
    return sources


def _first_row(b: ir.IRBuilder, block: Any) -> tuple[Any, Any, list]:
    place = b.sext(e.load(b, e.offset(b, block, Block.places), e.i32, 4), e.i64)
    return place, place, [e.load(b, e.offset(b, block, Block.sources), e.i64, 8)]


def _gather(b: ir.IRBuilder, sources: list, q: Any, dims: Any, factor: Any) -> None:
    """The rows at 8 addresses, times `factor`, transposed to [dim][8]; zeros to a whole 16."""
    half = ATTENTION_ROWS
    ty, picked = ir.VectorType(e.f32, half), ir.Constant(ir.VectorType(e.i32, half), [0] * half)
    many = b.shuffle_vector(e.splat(b, factor), e.floats(0.0), picked)

    def put(rows, dim, further=0):
        target = e.offset(b, b.add(q, times(b, dim, ROW_BYTES)), ROW_BYTES * further)
        for i, column in enumerate(_transposed(b, rows)):
            e.store(b, b.fmul(column, many), e.offset(b, target, ROW_BYTES * i), 4)

    def eight(dim):
        put([e.load(b, b.add(a, times(b, dim, 4)), ty, 4) for a in sources], dim)

    whole = b.and_(dims, number(-e.LANES))
    repeat_if_any(b, number(0), whole, half, eight)
    with b.if_then(b.icmp_signed("<", whole, dims)):
        left = b.sub(dims, whole)
        rest = [e.load_first(b, b.add(a, times(b, whole, 4)), left) for a in sources]
        for start in (0, half):
            picked = list(range(start, start + half))
            put([e.lanes_of(b, row, picked) for row in rest], whole, start)


def _transposed(b: ir.IRBuilder, rows: list) -> list:
    """8 vectors of 8 lanes, transposed in three rounds of pairwise interleaving."""
    pick = ir.VectorType(e.i32, 8)
    low, high = (
        ir.Constant(pick, [i for k in range(4) for i in (4 * h + k, 8 + 4 * h + k)]) for h in (0, 1)
    )
    for _ in range(3):
        pairs = [(rows[i], rows[i + 4]) for i in range(4)]
        rows = [b.shuffle_vector(x, y, half) for x, y in pairs for half in (low, high)]
    return rows
