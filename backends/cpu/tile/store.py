"""The end of a tile: bias and residual are added, live columns and existing rows are stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from runtime.backends.cpu.tile.formats import ROWS
from runtime.backends.cpu.tile.problem import Part, Problem
from runtime.backends.cpu.tile.vector import F32, const, vec

_FLOAT = 4


def store_tile(p: Problem, sums: list[list[Any]], parts: list[Part], t: Any) -> None:
    """Store sums [part][column] for tile `t`."""
    code = p.code
    for part, columns in zip(parts, sums, strict=True):
        row = code.at(code.times(part.group, ROWS), part.first)
        left = code.b.sub(p.n_rows, row)
        full = code.b.icmp_signed(">=", left, const(code.lanes))
        with code.b.if_else(full, likely=True) as (whole, partial):
            with whole:
                _store_whole(p, columns, row, t)
            with partial:
                _store_partial(p, columns, row, left, t)


def _store_whole(p: Problem, columns: list[Any], row: Any, t: Any) -> None:
    kind = vec(F32, p.code.lanes)
    bias = _bias(p, row, kind, t)
    for c, total in enumerate(columns):
        with _live_token(p, t, c) as token:
            value = p.code.b.fadd(total, bias)
            value = _plus_residual(p, value, token, row)
            _put(p, value, _out(p, token, row))


def _put(p: Problem, value: Any, address: Any) -> None:
    if p.past_caches is None:
        p.code.store(value, address, _FLOAT)
        return
    with p.code.b.if_else(p.past_caches) as (past, through):
        with past:
            p.code.store_past_caches(value, address)
        with through:
            p.code.store(value, address, _FLOAT)


def _store_partial(p: Problem, columns: list[Any], row: Any, left: Any, t: Any) -> None:
    """The last group of a matrix whose rows are not a multiple of 16: value by value."""
    code = p.code
    spill = code.stack(_FLOAT * code.lanes)
    for c, total in enumerate(columns):
        with _live_token(p, t, c) as token:
            code.store(total, spill, _FLOAT)

            def one(i: Any, token: Any = token) -> None:
                r = code.at(row, i)
                value = code.load(code.at(spill, code.times(i, _FLOAT)), F32, _FLOAT)
                value = code.b.fadd(value, _bias(p, r, F32, t))
                value = _plus_residual(p, value, token, r)
                code.store(value, _out(p, token, r), _FLOAT)

            code.each(0, left, one)


@contextmanager
def _live_token(p: Problem, t: Any, c: int) -> Iterator[Any]:
    """The output row of column c of tile t; what follows runs only if there is one."""
    if p.spec.indirect:
        token = p.record(t, const(1 + c))
        live = p.code.b.icmp_signed(">=", token, const(0))
    else:
        token = p.code.at(p.code.times(t, p.spec.columns), c)
        live = p.code.b.icmp_signed("<", token, p.live)
    with p.code.b.if_then(live, likely=True):
        yield token


def _bias(p: Problem, row: Any, kind: ir.Type, t: Any) -> Any:
    """The biases of rows from `row` on (of the expert of tile t), zeros if there are none."""
    zero = [0.0] * kind.count if isinstance(kind, ir.VectorType) else 0.0

    def given() -> Any:
        place = row
        if p.spec.indirect:
            place = p.code.at(row, p.code.times(p.expert(t), p.bias_stride))
        address = p.code.at(p.bias, p.code.times(place, _FLOAT))
        return p.code.load(address, kind, _FLOAT)

    return _if_given(p, "bias", given, lambda: ir.Constant(kind, zero))


def _plus_residual(p: Problem, value: Any, token: Any, row: Any) -> Any:
    place = p.code.at(p.code.times(token, p.add_stride), row)
    address = p.code.at(p.add, p.code.times(place, _FLOAT))

    def added() -> Any:
        return p.code.b.fadd(value, p.code.load(address, value.type, _FLOAT))

    return _if_given(p, "add", added, lambda: value)


def _if_given(p: Problem, name: str, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
    given = p.code.b.icmp_unsigned("!=", p.values[name], const(0))
    return p.code.choose(given, yes, no)


def _out(p: Problem, token: Any, row: Any) -> Any:
    place = p.code.at(p.code.times(token, p.out_stride), row)
    return p.code.at(p.out, p.code.times(place, _FLOAT))
