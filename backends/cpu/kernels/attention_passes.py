"""The two inner loops of attention, unrolled for R query rows.

Scores: R rows x 32 keys; K's 32 tokens of one dim are two vectors, widened once for the R rows,
and q is broadcast from memory. Every 32 dims make one partial sum, in which dims are added in
order; partial sums are added in order too, so the chains of different sums overlap in the
processor. Output: R rows x some dims; V's dims of one key are widened once for the R rows, and
keys are added in order. How many vectors a pass holds in registers changes no bit of any row.
Dims are those of a page: always a multiple of 16.
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
from .kv_planes import codes_of, k_place, k_step, load16, load_splat, v_place
from .target import chosen

_CHUNK = GROUP  # dims of one partial sum: those that share a scale

# Rows of a pass -> vectors of 16 keys (scores) and of 16 dims (output) that its registers hold.
_REGISTERS = {
    16: {8: (2, 2), 4: (2, 4), 2: (2, 4), 1: (2, 4)},
    8: {4: (1, 1), 2: (2, 2), 1: (2, 4)},
    4: {2: (1, 1), 1: (2, 2)},
}[chosen().lanes]


def _broadcast(b: ir.IRBuilder, address: Any) -> Any:
    return e.splat(b, e.load(b, address, e.f32, 4))


def _fma(b: ir.IRBuilder, x: Any, y: Any, z: Any) -> Any:
    return e.fma(b, x, y, z, s.FUSED)


def scores_pass(rows: int, format: KVFormat) -> Callable:
    """Emits: scores = q k^T of rows row.. and the 32 keys of a page."""
    held, unroll = _REGISTERS[rows][0], 4
    codes, n_sums = codes_of(format), rows * held
    size, has_minima = k_step(codes), len(format.shared) == 2

    def dims_of(b, q, page, count, first, ahead):
        """Sums of `count` dims for keys of vectors first, first + 1, .. (`held` of them).

        Behind them, where there are minima to multiply them with, the sums of q of each row.
        """

        def few(i, sums):
            sums = list(sums)
            for step in range(unroll):
                dim = b.add(i, number(step))
                at = b.add(page, times(b, dim, size))
                keys = [
                    load16(b, codes, e.offset(b, at, (first + j) * e.LANES * codes.dtype.nbytes))
                    for j in range(held)
                ]
                values = b.add(q, times(b, dim, ROW_BYTES))
                if first == 0 and step * size % 64 == 0:
                    for j in range(0, size, 64):
                        e.prefetch(b, b.add(e.offset(b, at, j), ahead), near=2)
                for r in range(rows):
                    value = _broadcast(b, e.offset(b, values, 4 * r))
                    for j, key in enumerate(keys):
                        sums[r * held + j] = _fma(b, value, key, sums[r * held + j])
                    if has_minima:
                        sums[n_sums + r] = b.fadd(sums[n_sums + r], value)
            return sums

        zeros = [e.floats(0.0)] * (n_sums + rows * has_minima)
        return repeat(b, number(0), count, unroll, zeros, few)

    def add(b, target, is_first, sums, shared):
        """Add the sums of a group, its scales and minima by vector of keys."""
        for r in range(rows):
            for j in range(held):
                at = e.offset(b, target, 4 * (r * PAGE + j * e.LANES))
                old, new = e.load(b, at, e.wide(e.f32), 4), sums[r * held + j]
                old = b.select(is_first, e.floats(0.0), old)
                new = _fma(b, new, shared[0][j], old) if shared else b.fadd(old, new)
                if has_minima:
                    new = _fma(b, sums[n_sums + r], shared[1][j], new)
                e.store(b, new, at, 4)

    def shared_of(b, page, dim, dims, first):
        """The numbers of the group at `dim`, by plane and vector of keys."""
        found = []
        for plane in format.shared:
            at, step = k_place(b, format, plane, page, dim, dims), e.LANES * plane.dtype.nbytes
            places = [e.offset(b, at, step * (first + j)) for j in range(held)]
            found.append([load16(b, plane, place) for place in places])
        return found

    def scores(b, block, row, page, dims, n_keys, o, ahead):
        q = b.add(e.offset(b, block, Block.q), times(b, row, 4))
        target = b.add(e.offset(b, block, Block.scores), times(b, row, 4 * PAGE))

        def chunk(dim):
            left = b.sub(dims, dim)
            count = b.select(b.icmp_signed("<", left, number(_CHUNK)), left, number(_CHUNK))
            here = b.add(page, times(b, dim, size))
            is_first = b.icmp_signed("==", dim, number(0))
            for first in range(0, PAGE // e.LANES, held):
                sums = dims_of(b, b.add(q, times(b, dim, ROW_BYTES)), here, count, first, ahead)
                shared = shared_of(b, page, dim, dims, first)
                add(b, e.offset(b, target, 4 * e.LANES * first), is_first, sums, shared)

        repeat_if_any(b, number(0), dims, _CHUNK, chunk)

    return scores


def _values(
    b: ir.IRBuilder, format: KVFormat, page: Any, key: Any, dim: Any, dims: Any, vectors: int
) -> tuple[Any, list[Any]]:
    """V of one key from `dim` on as `vectors` float32 vectors, and where its codes lie."""
    codes, found, shared = codes_of(format), [], []
    at = v_place(b, format, codes, page, key, dim, dims)
    for j in range(vectors):
        value = load16(b, codes, e.offset(b, at, e.LANES * codes.dtype.nbytes * j))
        if j * e.LANES % GROUP == 0:  # two vectors share these
            shared = _shared_by(b, format, page, key, b.add(dim, number(e.LANES * j)), dims)
        for numbers, apply in zip(shared, (b.fmul, b.fadd), strict=False):
            value = apply(value, numbers)
        found.append(value)
    return at, found


def _shared_by(
    b: ir.IRBuilder, format: KVFormat, page: Any, key: Any, dim: Any, dims: Any
) -> list[Any]:
    """The scale and the minimum, if there are such, of one key of V at a dim, in all lanes."""
    places = (v_place(b, format, plane, page, key, dim, dims) for plane in format.shared)
    return [load_splat(b, plane, at) for plane, at in zip(format.shared, places, strict=True)]


def output_pass(rows: int, format: KVFormat) -> Callable:
    """Emits: o = o * decay + p v for rows row.. of a block.

    Only the first n_keys tokens of the page are read: what lies behind them may be anything.
    """
    held, size = _REGISTERS[rows][1], codes_of(format).dtype.nbytes

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
            at, found = _values(b, format, page, i, dim, dims, vectors)
            for j in range(0, vectors * e.LANES * size, 64):
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
    sizes = sorted(_REGISTERS, reverse=True)
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
