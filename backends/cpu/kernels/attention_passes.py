"""The two inner loops of attention, unrolled for R query rows.

Scores: R rows x 32 keys; K's 32 tokens of one dim are two vectors, widened once for the R rows,
and q is broadcast from memory. Every 32 dims make one partial sum, in which dims are added in
order, or for codes one exact integer, of words of four dims; partial sums are added in order too,
so the chains of different sums overlap in the processor. Output: R rows x some dims; V's dims of
one key are widened once for the R rows, and keys are added in order. Of codes the weights of the 32
keys, times what a group of V has for each of them, become integers, and the products of a page are
one exact integer. How many vectors a pass holds in registers changes no bit of any row. Dims are
those of a page: always a multiple of 16.
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
from .kv_dots import WORDS, Numbers, code_dots, folded, middle
from .kv_planes import (
    check,
    key_words,
    load16,
    place_of_dim,
    place_of_four,
    place_of_token,
    step_of_dim,
    value_words,
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
    16: {8: (1, 1), 4: (2, 2), 2: (2, 2), 1: (2, 2)},
    8: {2: (1, 1), 1: (1, 2)},
    4: {1: (1, 1)},
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
        q = e.offset(b, block, Block.q)
        target = b.add(e.offset(b, block, Block.scores), times(b, row, 4 * PAGE))
        for first in range(0, PAGE // e.LANES, held):
            vectors = range(first, first + held)

            def chunk(dim, totals, vectors=vectors):
                left = b.sub(dims, dim)
                count = b.select(b.icmp_signed("<", left, number(_CHUNK)), left, number(_CHUNK))
                here = b.add(q, times(b, dim, ROW_BYTES))
                place = (page, dim, dims, vectors)
                sums = make(b, format, (rows, row), here, place, count, ahead)
                return [add(total) for add, total in zip(sums, totals, strict=True)]

            zeros = [e.floats(0.0)] * (rows * held)
            for i, total in enumerate(repeat(b, number(0), dims, _CHUNK, zeros, chunk)):
                r, j = divmod(i, held)
                e.store(b, total, e.offset(b, target, 4 * (r * PAGE + (first + j) * e.LANES)), 4)

    return scores


def _dots_of_floats(
    b: ir.IRBuilder, format: KVFormat, which: tuple, q: Any, place: tuple, count: Any, ahead: Any
) -> list[Callable]:
    """By row and vector of keys: what adds the products of `count` dims to what was before."""
    plane, unroll = format.codes[0], 4
    page, dim, dims, vectors = place
    size, held, (rows, row) = step_of_dim(plane), len(vectors), which
    page, q = place_of_dim(b, format, plane, page, dim, dims), b.add(q, times(b, row, 4))

    def few(i, sums):
        sums = list(sums)
        for step in range(unroll):
            at = b.add(page, times(b, b.add(i, number(step)), size))
            keys = [
                load16(b, plane, e.offset(b, at, j * e.LANES * plane.dtype.nbytes)) for j in vectors
            ]
            values = b.add(q, times(b, b.add(i, number(step)), ROW_BYTES))
            if vectors[0] == 0:
                _prefetch(b, at, size, ahead)
            for r in range(rows):
                value = _broadcast(b, e.offset(b, values, 4 * r))
                for j, key in enumerate(keys):
                    sums[r * held + j] = _fma(b, value, key, sums[r * held + j])
        return sums

    sums = repeat(b, number(0), count, unroll, [e.floats(0.0)] * (rows * held), few)
    return [lambda old, new=new: b.fadd(old, new) for new in sums]


def _dots_of_codes(
    b: ir.IRBuilder, format: KVFormat, which: tuple, q: Any, place: tuple, count: Any, ahead: Any
) -> list[Callable]:
    """The same of a group of codes, with its scales and minima."""
    (page, dim, dims, vectors), (rows, row) = place, which
    coding = format.coding
    assert coding is not None
    starts = [place_of_dim(b, format, plane, page, dim, dims) for plane in format.codes]
    if vectors[0] == 0:
        for plane, at in zip(format.codes, starts, strict=True):
            _prefetch(b, at, GROUP * step_of_dim(plane), ahead)
    is_whole = b.icmp_signed(">", count, number(GROUP // 2))
    words = [
        key_words(b, format, [e.offset(b, at, 4 * e.LANES * j) for at in starts], is_whole)
        for j in vectors
    ]
    shared = [_shared(b, format, page, dim, dims, j) for j in vectors]
    numbers = Numbers(b, q, row)
    found = _products(code_dots(b, coding), words, numbers, rows)

    def adds(r, j):
        def add(old):
            new = _fma(b, b.fmul(found[r][j], numbers.scale(r)), shared[j][0], old)
            return _fma(b, numbers.beside(r), shared[j][1], new) if coding.has_minimum else new

        return add

    return [adds(r, j) for r in range(rows) for j in range(len(vectors))]


def _prefetch(b: ir.IRBuilder, at: Any, nbytes: int, ahead: Any) -> None:
    for j in range(0, nbytes, 64):
        e.prefetch(b, b.add(e.offset(b, at, j), ahead), near=2)


def _shared(b: ir.IRBuilder, format: KVFormat, page: Any, dim: Any, dims: Any, j: int) -> list[Any]:
    """The scales that a group has for tokens 16 j to 16 j + 15, and what codes taken as 0 mean."""
    scale, *minimum = (
        load16(b, plane, e.offset(b, place, e.LANES * plane.dtype.nbytes * j))
        for plane in format.shared
        for place in [place_of_dim(b, format, plane, page, dim, dims)]
    )
    if not minimum:
        return [scale]
    assert format.coding is not None
    return [scale, _fma(b, scale, e.floats(float(middle(format.coding))), minimum[0])]


def _products(dots: Any, words: list, numbers: Numbers, rows: int) -> list[list[Any]]:
    """[row][vector] float32: products of the numbers of rows with vectors of codes, in words.

    A word of codes comes after another and is added to the sums of all rows, so that these do not
    wait for each other; their words of the numbers are operands in memory.
    """
    sums = [[dots.begin() for _ in words] for _ in range(rows)]
    for w in range(WORDS):
        for j, some in enumerate(words):
            codes = dots.codes(next(some))
            for r, mine in enumerate(sums):
                mine[j] = dots.add(mine[j], codes, numbers.word(w, r), w)
    return [[numbers.whole(r, dots.end(total)) for total in mine] for r, mine in enumerate(sums)]


def output_pass(rows: int, format: KVFormat) -> Callable:
    """Emits: o = o * decay + p v for rows row.. of a block.

    Only the first n_keys tokens of the page count: what lies behind them may be anything.
    """
    check(format)
    return (_output_of_codes if format.coding else _output_of_floats)(rows, format)


def output_row(format: KVFormat) -> Any:
    """(block, row, page, dims, first, last, o): the same of one row and the tokens first..last - 1.

    For values that are no codes, where rows see different parts of a page: 0 times what is not
    finite would be NaN.
    """
    output = _output_of_floats(1, format)

    @s.operation(s.void, s.i64, s.i64, s.i64, s.i64, s.i64, s.i64, s.i64)
    def run(b, block, row, page, dims, first, last, o):
        output(b, block, row, page, dims, last, o, number(0), first)

    return run


def _output_of_codes(rows: int, format: KVFormat) -> Callable:
    held, coding = _registers(format)[rows][1], format.coding
    assert coding is not None

    def output(b, block, row, page, dims, n_keys, o, ahead):
        decay = b.add(e.offset(b, block, Block.decay), times(b, row, 4))
        whole = b.and_(b.add(dims, number(GROUP - 1)), number(-GROUP))
        weights = b.add(o, times(b, whole, ROW_BYTES))

        def group(dim):
            numbers = Numbers(b, b.add(weights, times(b, dim, ROW_BYTES)), row)
            _store_weights(b, format, (rows, row), numbers, (block, page, dim, dims))
            places = [place_of_four(b, format, plane, page, dim, dims) for plane in format.codes]
            for plane, (at, step) in zip(format.codes, places, strict=True):
                for w in range(WORDS):
                    nbytes = 4 * GROUP // plane.dims
                    _prefetch(b, b.add(at, times(b, step, w)), nbytes, ahead)
            is_whole = b.icmp_signed(">", b.sub(dims, dim), number(GROUP // 2))
            for first in range(0, GROUP // e.LANES, held):
                halves = range(first, first + held)
                words = [value_words(b, format, places, half, is_whole) for half in halves]
                found = _products(code_dots(b, coding), words, numbers, rows)
                start = b.add(b.add(o, times(b, dim, ROW_BYTES)), times(b, row, 4 * e.LANES))
                for r, mine in enumerate(found):
                    factor = _broadcast(b, e.offset(b, decay, 4 * r))
                    for half, new in zip(halves, mine, strict=True):
                        at = e.offset(b, start, 4 * e.LANES * (half * ATTENTION_ROWS + r))
                        old = e.load(b, at, e.wide(e.f32), 4)
                        lift = numbers.beside(r) if coding.has_minimum else e.floats(0.0)
                        total = _fma(b, old, factor, lift)
                        e.store(b, _fma(b, new, numbers.scale(r), total), at, 4)

        repeat_if_any(b, number(0), dims, GROUP, group)

    return output


def _store_weights(
    b: ir.IRBuilder, format: KVFormat, which: tuple, numbers: Numbers, place: tuple
) -> None:
    """The weights p of 32 keys, times the scales that a group of V has, as integers.

    Beside them the sums of p times what codes taken as 0 mean. Where p is 0, of keys that the row
    does not see or that are not written yet, V may have anything.
    """
    (rows, row), (block, page, dim, dims) = which, place
    p = b.add(e.offset(b, block, Block.scores), times(b, row, 4 * PAGE))
    halves = range(PAGE // e.LANES)
    shared = [_shared(b, format, page, dim, dims, j) for j in halves]
    weights = [
        [e.load(b, e.offset(b, p, 4 * (PAGE * r + e.LANES * j)), e.wide(e.f32), 4) for j in halves]
        for r in range(rows)
    ]

    def times_of(mine, which):
        found = []
        for w, values in zip(mine, shared, strict=True):
            none = b.fcmp_ordered("==", w, e.floats(0.0))
            found.append(b.select(none, e.floats(0.0), b.fmul(w, values[which])))
        return tuple(found)

    assert format.coding is not None
    numbers.store(format.coding, [times_of(mine, 0) for mine in weights])
    if format.coding.has_minimum:
        sums = [b.fadd(*times_of(mine, 1)) for mine in weights]
        numbers.store_beside(folded(b, sums, b.fadd), rows)


def _output_of_floats(rows: int, format: KVFormat) -> Callable:
    held, plane = _registers(format)[rows][1], format.codes[0]

    def stripe(b, dim, vectors, block, row, page, dims, n_keys, o, ahead, first):
        """`vectors` vectors of dims from `dim` on, over the keys first..n_keys - 1."""
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
        step = e.LANES * plane.dtype.nbytes

        def key(i, sums):
            sums, weights = list(sums), b.add(p, times(b, i, 4))
            at = place_of_token(b, format, page, i, dim, dims)
            _prefetch(b, at, vectors * step, ahead)
            found = [load16(b, plane, e.offset(b, at, step * j)) for j in range(vectors)]
            for r in range(rows):
                weight = _broadcast(b, e.offset(b, weights, 4 * PAGE * r))
                for j, value in enumerate(found):
                    sums[r * vectors + j] = _fma(b, weight, value, sums[r * vectors + j])
            return sums

        for at, value in zip(places, repeat(b, first, n_keys, 1, sums, key), strict=True):
            e.store(b, value, at, 4)

    def output(b, block, row, page, dims, n_keys, o, ahead, first=None):
        rest = (block, row, page, dims, n_keys, o, ahead, first or number(0))
        at = number(0)
        for stop, vectors in ((b.and_(dims, number(-e.LANES * held)), held), (dims, 1)):
            step = e.LANES * vectors
            repeat_if_any(b, at, stop, step, lambda dim, n=vectors: stripe(b, dim, n, *rest))
            at = stop

    return output


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
