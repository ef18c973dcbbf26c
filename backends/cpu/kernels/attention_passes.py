"""The two inner loops of attention, unrolled for R query rows.

Scores: R rows x 32 keys; K's 32 tokens of one dim are two vectors, widened once for the R rows,
and q is broadcast from memory. Every 32 dims make one partial sum, in which dims are added in
order, or for codes one exact integer, of words of four dims; partial sums are added in order too,
so the chains of different sums overlap in the processor. Output: R rows x some dims; V's dims of
one key are widened once for the R rows, and keys are added in order. How many vectors a pass holds
in registers changes no bit of any row. Dims are those of a page: always a multiple of 16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from runtime.backends.cpu.abi import ATTENTION_ROWS
from runtime.ops.kv_formats import GROUP, PAGE, KVFormat

from . import emit as e
from . import simd as s
from .attention_block import ROW_BYTES, Block, repeat, repeat_if_any
from .emit import number, times
from .kv_dots import WORDS, KeyDots, sum_of, whole_dot, word_place
from .kv_planes import (
    check,
    k_place,
    k_step,
    key_words,
    load16,
    load_splat,
    v_place,
    value_codes,
)
from .target import chosen

_CHUNK = GROUP  # dims of one partial sum: those that share a scale

# Rows of a pass -> vectors of 16 keys (scores) and of 16 dims (output) that its registers hold.
_REGISTERS = {
    16: {8: (2, 2), 4: (2, 4), 2: (2, 4), 1: (2, 4)},
    8: {4: (1, 1), 2: (2, 2), 1: (2, 4)},
    4: {2: (1, 1), 1: (2, 2)},
}[chosen().lanes]
_REGISTERS_OF_CODES = {
    16: {8: (1, 2), 4: (2, 4), 2: (2, 4), 1: (2, 4)},
    8: {2: (1, 2), 1: (1, 4)},
    4: {1: (1, 2)},
}[chosen().lanes]


def _registers(format: KVFormat) -> dict[int, tuple[int, int]]:
    return _REGISTERS_OF_CODES if format.coding else _REGISTERS


def _broadcast(b: ir.IRBuilder, address: Any) -> Any:
    return e.splat(b, e.load(b, address, e.f32, 4))


def _fma(b: ir.IRBuilder, x: Any, y: Any, z: Any) -> Any:
    return e.fma(b, x, y, z, s.FUSED)


def scores_pass(rows: int, format: KVFormat) -> Callable:
    """Emits: scores = q k^T of rows row.. and the 32 keys of a page."""
    check(format)
    held = _registers(format)[rows][0]
    make = _dots_of_codes if format.coding else _dots_of_floats

    def scores(b, block, row, page, dims, n_keys, o, ahead):
        q = b.add(e.offset(b, block, Block.q), times(b, row, 4))
        target = b.add(e.offset(b, block, Block.scores), times(b, row, 4 * PAGE))
        for first in range(0, PAGE // e.LANES, held):
            vectors = range(first, first + held)

            def chunk(dim, totals, vectors=vectors):
                left = b.sub(dims, dim)
                count = b.select(b.icmp_signed("<", left, number(_CHUNK)), left, number(_CHUNK))
                here = b.add(q, times(b, dim, ROW_BYTES))
                sums = make(b, format, rows, here, (page, dim, dims, vectors), count, ahead)
                return [add(total) for add, total in zip(sums, totals, strict=True)]

            zeros = [e.floats(0.0)] * (rows * held)
            for i, total in enumerate(repeat(b, number(0), dims, _CHUNK, zeros, chunk)):
                r, j = divmod(i, held)
                e.store(b, total, e.offset(b, target, 4 * (r * PAGE + (first + j) * e.LANES)), 4)

    return scores


def _dots_of_floats(
    b: ir.IRBuilder, format: KVFormat, rows: int, q: Any, place: tuple, count: Any, ahead: Any
) -> list[Callable]:
    """By row and vector of keys: what adds the products of `count` dims to what was before."""
    plane, unroll = format.codes[0], 4
    page, dim, dims, vectors = place
    size, held = k_step(plane), len(vectors)
    page = k_place(b, format, plane, page, dim, dims)

    def few(i, sums):
        sums = list(sums)
        for step in range(unroll):
            at = b.add(page, times(b, b.add(i, number(step)), size))
            keys = [
                load16(b, plane, e.offset(b, at, j * e.LANES * plane.dtype.nbytes)) for j in vectors
            ]
            values = b.add(q, times(b, b.add(i, number(step)), ROW_BYTES))
            if vectors[0] == 0:
                for j in range(0, size, 64):
                    e.prefetch(b, b.add(e.offset(b, at, j), ahead), near=2)
            for r in range(rows):
                value = _broadcast(b, e.offset(b, values, 4 * r))
                for j, key in enumerate(keys):
                    sums[r * held + j] = _fma(b, value, key, sums[r * held + j])
        return sums

    sums = repeat(b, number(0), count, unroll, [e.floats(0.0)] * (rows * held), few)
    return [lambda old, new=new: b.fadd(old, new) for new in sums]


def _dots_of_codes(
    b: ir.IRBuilder, format: KVFormat, rows: int, q: Any, place: tuple, count: Any, ahead: Any
) -> list[Callable]:
    """The same of a group of codes, with its scales and minima."""
    page, dim, dims, vectors = place
    coding = format.coding
    assert coding is not None
    dots = KeyDots(b, coding)
    starts = [k_place(b, format, plane, page, dim, dims) for plane in format.codes]
    if vectors[0] == 0:
        for plane, at in zip(format.codes, starts, strict=True):
            for j in range(0, GROUP * k_step(plane), 64):
                e.prefetch(b, b.add(e.offset(b, at, j), ahead), near=2)
    is_whole = b.icmp_signed(">", count, number(GROUP // 2))
    words = [
        key_words(b, format, [e.offset(b, at, 4 * e.LANES * j) for at in starts], is_whole)
        for j in vectors
    ]
    shared = []
    for plane in format.shared:
        at, step = k_place(b, format, plane, page, dim, dims), e.LANES * plane.dtype.nbytes
        shared.append([load16(b, plane, e.offset(b, at, step * j)) for j in vectors])
    found = _products(b, dots, words, q, rows)

    def adds(r, j):
        def add(old):
            new = _fma(b, whole_dot(b, q, r, *found(r, j)), shared[0][j], old)
            return _fma(b, sum_of(b, q, r), shared[1][j], new) if coding.has_minimum else new

        return add

    return [adds(r, j) for r in range(rows) for j in range(len(vectors))]


def _products(b: ir.IRBuilder, dots: KeyDots, words: list, q: Any, rows: int) -> Callable:
    """(row, vector): sums of products with the high and the low bytes of q.

    Words of the keys come one after another and are added to the sums of all rows, which so do not
    wait for each other; their words of q are operands in memory.
    """
    sums = [[[dots.begin(), dots.begin()] for _ in words] for _ in range(rows)]
    for w in range(WORDS):
        for j, some in enumerate(words):
            key = dots.keys(next(some))
            for r, mine in enumerate(sums):
                mine[j] = [
                    dots.add(x, key, word_place(b, q, n, w, r), w) for n, x in enumerate(mine[j])
                ]
    found = [[[dots.end(total) for total in both] for both in mine] for mine in sums]
    return lambda r, j: found[r][j]


def _values(
    b: ir.IRBuilder, format: KVFormat, page: Any, key: Any, dim: Any, dims: Any, vectors: int
) -> tuple[list[tuple[Any, int]], list[Any]]:
    """What is read of V of one key from `dim` on, (address, bytes); `vectors` float32 vectors."""
    read, found = [], []
    if format.coding is None:
        plane = format.codes[0]
        at, step = v_place(b, format, plane, page, key, dim, dims), e.LANES * plane.dtype.nbytes
        read.append((at, vectors * step))
        return read, [load16(b, plane, e.offset(b, at, step * j)) for j in range(vectors)]
    for plane in format.codes:
        nbytes = e.LANES * vectors // plane.dims * plane.dtype.nbytes
        read.append((v_place(b, format, plane, page, key, dim, dims), nbytes))
    for group in range(vectors * e.LANES // GROUP):
        step = group * GROUP
        places = [
            e.offset(b, at, step // plane.dims)
            for (at, _), plane in zip(read, format.codes, strict=True)
        ]
        scale, *minimum = (
            load_splat(
                b, plane, v_place(b, format, plane, page, key, b.add(dim, number(step)), dims)
            )
            for plane in format.shared
        )
        lift = minimum[0] if minimum else None
        if format.coding.lowest and not format.coding.book:
            lift = b.fmul(scale, e.floats(float(format.coding.lowest)))
        for codes in value_codes(b, format, places):
            found.append(_fma(b, codes, scale, lift) if lift else b.fmul(codes, scale))
    return read, found


def output_pass(rows: int, format: KVFormat) -> Callable:
    """Emits: o = o * decay + p v for rows row.. of a block.

    Only the first n_keys tokens of the page are read: what lies behind them may be anything.
    """
    check(format)
    held = _registers(format)[rows][1]

    def stripe(b, dim, vectors, block, row, page, dims, n_keys, o, ahead):
        """`vectors` vectors of dims from `dim` on, over all keys."""
        p = b.add(e.offset(b, block, Block.scores), times(b, row, 4 * PAGE))
        decay = b.add(e.offset(b, block, Block.decay), times(b, row, 4))
        start = b.add(b.add(o, times(b, dim, ROW_BYTES)), times(b, row, 4 * e.LANES))
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
            sums, weights = list(sums), b.add(p, times(b, i, 4))
            read, found = _values(b, format, page, i, dim, dims, vectors)
            for at, nbytes in read:
                for j in range(0, nbytes, 64):
                    e.prefetch(b, b.add(e.offset(b, at, j), ahead), near=2)
            for r in range(rows):
                weight = _broadcast(b, e.offset(b, weights, 4 * PAGE * r))
                for j, value in enumerate(found):
                    sums[r * vectors + j] = _fma(b, weight, value, sums[r * vectors + j])
            return sums

        for at, value in zip(places, repeat(b, number(0), n_keys, 1, sums, key), strict=True):
            e.store(b, value, at, 4)

    def output(b, block, row, page, dims, n_keys, o, ahead):
        rest = (block, row, page, dims, n_keys, o, ahead)
        at, least = number(0), GROUP // e.LANES if format.coding else 1
        for stop, vectors in ((b.and_(dims, number(-e.LANES * held)), held), (dims, least)):
            step = e.LANES * vectors
            repeat_if_any(b, at, stop, step, lambda dim, n=vectors: stripe(b, dim, n, *rest))
            at = stop

    return output


def widening(format: KVFormat) -> Any:
    """(page, target, n_keys, dims, ahead): the first keys of V as float32 [keys][dims].

    What rows of several blocks multiply is then taken from codes once. A last group of half the
    dims fills its second half too, of which the next key, or 64 bytes behind all, makes way.
    """
    check(format)

    @s.operation(s.void, s.i64, s.i64, s.i64, s.i64, s.i64)
    def widen(b, page, target, n_keys, dims, ahead):
        def key(i):
            row = b.add(target, times(b, b.mul(i, dims), 4))

            def group(dim):
                read, found = _values(b, format, page, i, dim, dims, GROUP // e.LANES)
                for at, _ in read:
                    e.prefetch(b, b.add(at, ahead), near=2)
                for j, value in enumerate(found):
                    at = e.offset(b, b.add(row, times(b, dim, 4)), 4 * e.LANES * j)
                    e.store(b, value, at, 4)

            repeat_if_any(b, number(0), dims, GROUP, group)

        repeat_if_any(b, number(0), n_keys, 1, key)

    return widen


def row_passes(make: Callable, format: KVFormat) -> Any:
    """(block, rows, page, dims, n_keys, o, ahead): a pass over rows 0.. of a block.

    What lies `ahead` bytes behind the parts of the page that are read is prefetched.

    Rows are taken as many at a time as there are registers for; a rest takes the next power of
    two, whose further rows are in the block but mean nothing.
    """
    sizes = sorted(_registers(format), reverse=True)
    passes = [make(size, format) for size in sizes]

    def fitting(b, left, which, arguments):
        if which + 1 == len(sizes):
            passes[which](b, *arguments)
            return
        enough = b.icmp_signed(">", left, number(sizes[which + 1]))
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
            some(number(0))
        else:
            repeat_if_any(b, number(0), rows, sizes[0], some)

    return run
