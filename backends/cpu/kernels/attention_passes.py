"""The two inner loops of attention and its softmax arithmetic, unrolled for R query rows.

Scores: R rows x 32 keys; K's 32 tokens of one dim are two vectors, widened once for the R rows,
and q is broadcast from memory. Every 32 dims make one partial sum, in which dims are added in
order; partial sums are added in order too, so the chains of different sums overlap in the
processor. Output: R rows x some dims; V's dims of one key are widened once for the R rows, and
keys are added in order. How many vectors a pass holds in registers changes no bit of any row.

A block of 8 rows keeps its state in memory (`Block`): q as [dim][8] and o as [dims / 16][8][16],
so that a pass finds all its rows at constant distances from one address.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from runtime.backends.cpu.signatures import ATTENTION_ROWS, PAGE

from . import emit as e
from . import simd as s
from .target import chosen

_CHUNK = 32  # dims of one partial sum, and values under one scale of q8_0
_ROW = 4 * ATTENTION_ROWS  # bytes of one dim of q
_ITEM = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 1}
_ELEMENT = {"f32": e.f32, "f16": e.i16, "bf16": e.i16, "q8_0": e.i8}


class Block:
    """Byte offsets in the state of a block of 8 rows; signatures.py gives its size."""

    places, lowest, highest, sources, targets = 0, 32, 40, 64, 128
    peak, decay, sums, scores, q = 192, 256, 320, 832, 1856


# Rows of a pass -> vectors of 16 keys (scores) and of 16 dims (output) that its registers hold.
_REGISTERS = {
    16: {8: (2, 2), 4: (2, 4), 2: (2, 4), 1: (2, 4)},
    8: {4: (1, 1), 2: (2, 2), 1: (2, 4)},
    4: {2: (1, 1), 1: (2, 2)},
}[chosen().lanes]


def _number(value: int) -> ir.Constant:
    return ir.Constant(e.i64, value)


def _times(b: ir.IRBuilder, value: Any, factor: int) -> Any:
    return b.mul(value, _number(factor)) if factor != 1 else value


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
    following = b.add(i, _number(step))
    i.add_incoming(following, b.block)
    for phi, first, result in zip(values, carried, results, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(result, b.block)
    b.cbranch(b.icmp_signed("<", following, stop), loop, after)
    b.position_at_end(after)
    return results


def _repeat_if_any(b: ir.IRBuilder, start: Any, stop: Any, step: int, body: Callable) -> None:
    """body(i) for i in range(start, stop, step), where that may be empty."""

    def once(i, _):
        body(i)
        return []

    with b.if_then(b.icmp_signed("<", start, stop)):
        repeat(b, start, stop, step, [], once)


def _widen(b: ir.IRBuilder, address: Any, kind: str, lanes: int = e.LANES) -> Any:
    """16 cache values as float32; only the first `lanes` are read, the others are zero."""
    element = _ELEMENT[kind]
    value = e.load(b, address, ir.VectorType(element, lanes), 1)
    if lanes < e.LANES:
        zero = ir.Constant(value.type, [0] * lanes)
        picked = [*range(lanes), *range(lanes, 2 * lanes)][: e.LANES]
        value = b.shuffle_vector(value, zero, ir.Constant(e.wide(e.i32), picked))
    if kind == "f16":
        return e.half_to_float(b, value, s.HALVES)
    if kind == "bf16":
        return e.brain_to_float(b, value)
    return value if kind == "f32" else b.sitofp(b.sext(value, e.wide(e.i32)), e.wide(e.f32))


def _broadcast(b: ir.IRBuilder, address: Any) -> Any:
    return e.splat(b, e.load(b, address, e.f32, 4))


def _prefetch(b: ir.IRBuilder, address: Any) -> None:
    """Ask for the cache line at an address in the second level of the cache."""
    arguments = [ir.Constant(e.i32, v) for v in (0, 2, 1)]
    pointer = e.pointer(b, address, e.i8)
    e.intrinsic_call(b, "llvm.prefetch.p0", ir.VoidType(), [pointer, *arguments])


def _fma(b: ir.IRBuilder, x: Any, y: Any, z: Any) -> Any:
    return e.fma(b, x, y, z, s.FUSED)


def scores_pass(rows: int, kind: str) -> Callable:
    """Emits: scores = q k^T of rows row.. and the 32 keys of a page."""
    held, unroll = _REGISTERS[rows][0], 4
    size = _ITEM[kind]

    def dims_of(b, q, page, count, first, ahead):
        """Sums of `count` dims for keys of vectors first, first + 1, .. (`held` of them)."""

        def few(i, sums):
            sums = list(sums)
            for step in range(unroll):
                dim = b.add(i, _number(step))
                at = b.add(page, _times(b, dim, PAGE * size))
                keys = [
                    _widen(b, e.offset(b, at, (first + j) * e.LANES * size), kind)
                    for j in range(held)
                ]
                values = b.add(q, _times(b, dim, _ROW))
                if first == 0 and step * PAGE * size % 64 == 0:
                    for j in range(0, PAGE * size, 64):
                        _prefetch(b, b.add(e.offset(b, at, j), ahead))
                for r in range(rows):
                    value = _broadcast(b, e.offset(b, values, 4 * r))
                    for j, key in enumerate(keys):
                        sums[r * held + j] = _fma(b, value, key, sums[r * held + j])
            return sums

        return repeat(b, _number(0), count, unroll, [e.floats(0.0)] * (rows * held), few)

    def add(b, target, is_first, sums, scales):
        for r in range(rows):
            for j in range(held):
                at = e.offset(b, target, 4 * (r * PAGE + j * e.LANES))
                old, new = e.load(b, at, e.wide(e.f32), 4), sums[r * held + j]
                old = b.select(is_first, e.floats(0.0), old)
                e.store(b, _fma(b, new, scales[j], old) if scales else b.fadd(old, new), at, 4)

    def scores(b, block, row, page, dims, n_keys, o, ahead):
        q = b.add(e.offset(b, block, Block.q), _times(b, row, 4))
        target = b.add(e.offset(b, block, Block.scores), _times(b, row, 4 * PAGE))

        def chunk(dim):
            left = b.sub(dims, dim)
            count = b.select(b.icmp_signed("<", left, _number(_CHUNK)), left, _number(_CHUNK))
            here = b.add(page, _times(b, dim, PAGE * size))
            is_first = b.icmp_signed("==", dim, _number(0))
            for first in range(0, PAGE // e.LANES, held):
                sums = dims_of(b, b.add(q, _times(b, dim, _ROW)), here, count, first, ahead)
                scales = []
                if kind == "q8_0":
                    at = b.add(b.add(page, _times(b, dims, PAGE)), _times(b, dim, 2))
                    places = [e.offset(b, at, 2 * e.LANES * (first + j)) for j in range(held)]
                    scales = [_widen(b, place, "f16") for place in places]
                add(b, e.offset(b, target, 4 * e.LANES * first), is_first, sums, scales)

        _repeat_if_any(b, _number(0), dims, _CHUNK, chunk)

    return scores


def _scale_of(b: ir.IRBuilder, page: Any, key: Any, dim: Any, dims: Any) -> Any:
    """The q8_0 scale of one key of V at a dim, in all lanes."""
    groups = b.lshr(dims, _number(5))
    which = b.add(b.mul(key, groups), b.lshr(dim, _number(5)))
    at = b.add(b.add(page, _times(b, dims, PAGE)), _times(b, which, 2))
    return e.half_to_float(b, e.splat(b, e.load(b, at, e.i16, 1)), s.HALVES)


def output_pass(rows: int, kind: str) -> Callable:
    """Emits: o = o * decay + p v for rows row.. of a block.

    Only the first n_keys tokens of the page are read: what lies behind them may be anything.
    """
    size, held = _ITEM[kind], _REGISTERS[rows][1]

    def values(b, page, key, dim, dims, ahead, vectors, lanes):
        at = b.add(page, _times(b, b.add(b.mul(key, dims), dim), size))
        found = []
        for j in range(0, vectors * e.LANES * size, 64):
            _prefetch(b, b.add(e.offset(b, at, j), ahead))
        for j in range(vectors):
            value = _widen(b, e.offset(b, at, e.LANES * size * j), kind, lanes)
            if kind == "q8_0":
                if j % 2 == 0:
                    place = b.add(dim, _number(e.LANES * j))
                    scale = _scale_of(b, page, key, place, dims)
                value = b.fmul(value, scale)
            found.append(value)
        return found

    def stripe(b, dim, vectors, lanes, block, row, page, dims, n_keys, o, ahead):
        """`vectors` vectors of dims from `dim` on, over all keys."""
        p = b.add(e.offset(b, block, Block.scores), _times(b, row, 4 * PAGE))
        decay = b.add(e.offset(b, block, Block.decay), _times(b, row, 4))
        start = b.add(b.add(o, _times(b, dim, _ROW)), _times(b, row, 4 * e.LANES))
        places = [
            e.offset(b, start, 4 * e.LANES * (j * ATTENTION_ROWS + r))
            for r in range(rows)
            for j in range(vectors)
        ]
        factors = [_broadcast(b, e.offset(b, decay, 4 * r)) for r in range(rows)]
        sums = [
            b.fmul(e.load(b, at, e.wide(e.f32), 4), factors[i // vectors])
            for i, at in enumerate(places)
        ]

        def key(i, sums):
            sums, weights = list(sums), b.add(p, _times(b, i, 4))
            found = values(b, page, i, dim, dims, ahead, vectors, lanes)
            for r in range(rows):
                weight = _broadcast(b, e.offset(b, weights, 4 * PAGE * r))
                for j, value in enumerate(found):
                    sums[r * vectors + j] = _fma(b, weight, value, sums[r * vectors + j])
            return sums

        for at, value in zip(places, repeat(b, _number(0), n_keys, 1, sums, key), strict=True):
            e.store(b, value, at, 4)

    def output(b, block, row, page, dims, n_keys, o, ahead):
        rest = (block, row, page, dims, n_keys, o, ahead)
        wide, whole = (b.and_(dims, _number(-e.LANES * n)) for n in (held, 1))
        at = _number(0)
        for stop, vectors in ((wide, held), (whole, 1)):
            step = e.LANES * vectors
            _repeat_if_any(
                b, at, stop, step, lambda dim, n=vectors: stripe(b, dim, n, e.LANES, *rest)
            )
            at = stop
        if kind != "q8_0":
            with b.if_then(b.icmp_signed("<", whole, dims)):
                stripe(b, whole, 1, e.LANES // 2, *rest)

    return output


def row_passes(make: Callable, kind: str) -> Any:
    """(block, rows, page, dims, n_keys, o): a pass over rows 0.. of a block.

    Rows are taken as many at a time as there are registers for; a rest takes the next power of
    two, whose further rows are in the block but mean nothing.
    """
    sizes = sorted(_REGISTERS, reverse=True)
    passes = [make(size, kind) for size in sizes]

    def fitting(b, left, which, arguments):
        if which + 1 == len(sizes):
            passes[which](b, *arguments)
            return
        enough = b.icmp_signed(">", left, _number(sizes[which + 1]))
        with b.if_else(enough) as (yes, no):
            with yes:
                passes[which](b, *arguments)
            with no:
                fitting(b, left, which + 1, arguments)

    @s.operation(s.void, s.i64, s.i64, s.i64, s.i64, s.i64, s.i64, s.i64)
    def run(b, block, rows, page, dims, n_keys, o, ahead):
        def some(row):
            fitting(b, b.sub(rows, row), 0, (block, row, page, dims, n_keys, o, ahead))

        if sizes[0] >= ATTENTION_ROWS:
            some(_number(0))
        else:
            _repeat_if_any(b, _number(0), rows, sizes[0], some)

    return run


@s.operation(s.f32x16, s.i64)
def row_peaks(b, scores):
    """Lane r: the largest of the 32 scores of row r, for the 8 rows of a block."""
    lanes = range(e.LANES)
    parts = []
    for r in range(ATTENTION_ROWS):
        low, high = (e.offset(b, scores, 4 * (r * PAGE + h * e.LANES)) for h in (0, 1))
        halves = (e.load(b, at, e.wide(e.f32), 4) for at in (low, high))
        parts.append((e.larger(b, *halves), [r] * e.LANES))
    while len(parts) > 1:
        parts = [_merge(b, *parts[i : i + 2]) for i in range(0, len(parts), 2)]
    value, _ = parts[0]  # two lanes for each row are left
    even, odd = ([2 * (i % ATTENTION_ROWS) + k for i in lanes] for k in (0, 1))
    return e.larger(b, e.lanes_of(b, value, even), e.lanes_of(b, value, odd))


def _merge(b: ir.IRBuilder, first: tuple, second: tuple) -> tuple[Any, list[int]]:
    """Two vectors in one: each row's lanes are folded to half their number."""
    (x, x_rows), (y, y_rows) = first, second
    rows = x_rows + y_rows
    low: list[int] = []
    high: list[int] = []
    for row in dict.fromkeys(rows):
        places = [i for i, r in enumerate(rows) if r == row]
        low += places[: len(places) // 2]
        high += places[len(places) // 2 :]
    parts = (b.shuffle_vector(x, y, ir.Constant(e.wide(e.i32), picked)) for picked in (low, high))
    return e.larger(b, *parts), [rows[i] for i in low]


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
    small = _fma(b, b.fmul(e.horner(b, square, _TANH, s.FUSED), square), x, x)
    power = e.exp(b, b.fmul(e.absolute(b, x), e.floats(2.0)), s.FUSED)
    large = b.fsub(e.floats(1.0), b.fdiv(e.floats(2.0), b.fadd(power, e.floats(1.0))))
    sign = b.and_(b.bitcast(x, e.wide(e.i32)), e.ints(0x80000000))
    large = b.bitcast(b.or_(b.bitcast(large, e.wide(e.i32)), sign), e.wide(e.f32))
    return b.select(b.fcmp_ordered("<", square, e.floats(0.49)), small, large)


@s.operation(s.void, s.i64, s.i64, s.i64, s.i64, s.f32)
def begin_block(b, block, rows, k_dim, v_dim, factor):
    """A block whose `rows` have places, sources and peaks: lowest and highest place, q, o = 0.

    q is [dim][8], times `factor`; rows that are missing repeat the first.
    """
    lowest, highest, sources = _first_row(b, block)
    for r in range(1, ATTENTION_ROWS):
        there = b.icmp_signed("<", _number(r), rows)
        place = e.load(b, e.offset(b, block, Block.places + 4 * r), e.i32, 4)
        place = b.select(there, b.sext(place, e.i64), lowest)
        lowest = b.select(b.icmp_signed("<", place, lowest), place, lowest)
        highest = b.select(b.icmp_signed(">", place, highest), place, highest)
        source = e.load(b, e.offset(b, block, Block.sources + 8 * r), e.i64, 8)
        sources.append(b.select(there, source, sources[0]))
    e.store(b, lowest, e.offset(b, block, Block.lowest), 8)
    e.store(b, highest, e.offset(b, block, Block.highest), 8)
    q = e.offset(b, block, Block.q)
    _gather(b, sources, q, k_dim, factor)
    o = b.add(q, _times(b, k_dim, _ROW))

    def clear(dim):
        for r in range(ATTENTION_ROWS):
            at = e.offset(b, b.add(o, _times(b, dim, _ROW)), 4 * e.LANES * r)
            e.store(b, e.floats(0.0), at, 4)

    _repeat_if_any(b, _number(0), v_dim, e.LANES, clear)


def _first_row(b: ir.IRBuilder, block: Any) -> tuple[Any, Any, list]:
    place = b.sext(e.load(b, e.offset(b, block, Block.places), e.i32, 4), e.i64)
    return place, place, [e.load(b, e.offset(b, block, Block.sources), e.i64, 8)]


def _gather(b: ir.IRBuilder, sources: list, q: Any, dims: Any, factor: Any) -> None:
    """The rows at 8 addresses, times `factor`, transposed to [dim][8]."""
    half = ATTENTION_ROWS
    ty, picked = ir.VectorType(e.f32, half), ir.Constant(ir.VectorType(e.i32, half), [0] * half)
    many = b.shuffle_vector(e.splat(b, factor), e.floats(0.0), picked)

    def eight(dim):
        rows = [e.load(b, b.add(a, _times(b, dim, 4)), ty, 4) for a in sources]
        target = b.add(q, _times(b, dim, _ROW))
        for i, column in enumerate(_transposed(b, rows)):
            e.store(b, b.fmul(column, many), e.offset(b, target, _ROW * i), 4)

    _repeat_if_any(b, _number(0), dims, half, eight)


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
