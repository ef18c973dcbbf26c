"""The two passes of the gated delta rule over some columns of a state.

`n` columns of S [dk, dv] are taken, a multiple of 16 that is one of the widths, or less than 16;
a row is `row` bytes behind the one before it. Sums add the rows in order, one after the other, in a
lane for each column.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from . import emit as e
from . import simd as s
from .emit import number
from .target import chosen

# Widths in vectors of 16 columns: two sums of each and as many updates fill the registers.
_WIDTHS = {16: (4, 2, 1), 8: (2, 1), 4: (1,)}[chosen().lanes]
WIDEST = _WIDTHS[0] * e.LANES  # columns


class _Columns:
    """How a pass reads and writes its columns of a row: some vectors, or the start of one."""

    def __init__(self, vectors: int, part: Any = None) -> None:
        self.vectors, self.part = range(vectors), part

    def load(self, b: ir.IRBuilder, address: Any, j: int) -> Any:
        at = e.offset(b, address, 64 * j)
        if self.part is None:
            return e.load(b, at, e.wide(e.f32), 4)
        return e.load_first(b, at, self.part)

    def store(self, b: ir.IRBuilder, value: Any, address: Any, j: int) -> None:
        at = e.offset(b, address, 64 * j)
        if self.part is None:
            e.store(b, value, at, 4)
        else:
            e.store_first(b, value, at, self.part)

    def sums(self, b: ir.IRBuilder) -> list:
        """Running sums, zero at first; LLVM keeps them in registers."""
        return [cgutils.alloca_once_value(b, e.floats(0.0)) for _ in self.vectors]

    def leave(self, b: ir.IRBuilder, sums: list, address: Any) -> None:
        """Running sums to memory, as whole vectors."""
        for j in self.vectors:
            e.store(b, b.load(sums[j]), e.offset(b, address, 64 * j), 4)


def _fitting(b: ir.IRBuilder, n: Any, emit: Callable[[_Columns], None], widths: tuple) -> None:
    """emit for as many columns as n says."""
    if not widths:
        emit(_Columns(1, n))
        return
    with b.if_else(b.icmp_signed(">=", n, number(widths[0] * e.LANES))) as (yes, no):
        with yes:
            emit(_Columns(widths[0]))
        with no:
            _fitting(b, n, emit, widths[1:])


def _each_row(b: ir.IRBuilder, rows: Any, body: Callable[[Any], None]) -> None:
    """body(i) for all rows in order. Unrolled it is no faster (measured)."""
    with cgutils.for_range(b, rows) as loop:
        body(loop.index)


def _broadcast(b: ir.IRBuilder, address: Any, i: Any) -> Any:
    return e.splat(b, e.load(b, b.add(address, b.shl(i, number(2))), e.f32, 4))


def _add(b: ir.IRBuilder, sums: list, j: int, factor: Any, value: Any) -> None:
    b.store(e.fma(b, factor, value, b.load(sums[j]), s.FUSED), sums[j])


@s.operation(s.void, *[s.i64] * 6)
def read_keys(b, state, row, k, dk, n, sums):
    """S^T k to `sums`."""

    def emit(columns: _Columns) -> None:
        keys = columns.sums(b)

        def body(i):
            at, key = b.add(state, b.mul(i, row)), _broadcast(b, k, i)
            for j in columns.vectors:
                _add(b, keys, j, key, columns.load(b, at, j))

        _each_row(b, dk, body)
        columns.leave(b, keys, sums)

    _fitting(b, n, emit, _WIDTHS)


@s.operation(s.void, *[s.i64] * 6, *[s.f32] * 2, *[s.i64] * 6, s.f32, s.i64)
def update(
    b, source, row, target, target_row, dk, n, decay, beta, k, v, q, next_k, sums, out, scale, ahead
):  # fmt: skip
    """S * decay + k error^T from source to target, and of that scale S^T q to `out`.

    The error is beta (v - decay S^T k). S^T k is found at `sums`, and S^T next_k left there. What
    lies `ahead` bytes behind the source is prefetched, unless that is 0.
    """

    def emit(columns: _Columns) -> None:
        outputs, following, factor = columns.sums(b), columns.sums(b), e.splat(b, decay)
        errors = []
        for j in columns.vectors:
            known = e.load(b, e.offset(b, sums, 64 * j), e.wide(e.f32), 4)
            error = e.fma(b, b.fneg(factor), known, columns.load(b, v, j), s.FUSED)
            errors.append(b.fmul(error, e.splat(b, beta)))

        def body(i):
            at, there = b.add(source, b.mul(i, row)), b.add(target, b.mul(i, target_row))
            with b.if_then(b.icmp_signed("!=", ahead, number(0))):
                for j in columns.vectors:
                    e.prefetch(b, e.offset(b, b.add(at, ahead), 64 * j), near=2)
            key, query, next_key = (_broadcast(b, x, i) for x in (k, q, next_k))
            for j in columns.vectors:
                value = b.fmul(columns.load(b, at, j), factor)
                value = e.fma(b, key, errors[j], value, s.FUSED)
                columns.store(b, value, there, j)
                _add(b, outputs, j, query, value)
                _add(b, following, j, next_key, value)

        _each_row(b, dk, body)
        for j in columns.vectors:
            columns.store(b, b.fmul(b.load(outputs[j]), e.splat(b, scale)), out, j)
        columns.leave(b, following, sums)

    _fitting(b, n, emit, _WIDTHS)
