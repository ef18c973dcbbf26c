"""Sums of one AMX tile over a stretch of K: matrix instructions, and vector code that scales.

For every scale group (32 elements, or 16 where the format has a scale for each half) the matrix
unit makes 16 x 16 integer dots in a tile register; they go to memory and are added to the float
sums there. A few groups are under way at once, in a pipeline that runs through the whole stretch:
one is multiplied while an earlier one is written and a still earlier one is scaled, column by
column between these steps, as the units wait for each other otherwise.

Every tile register is zeroed right after its last use: one that holds zeros needs no room in the
processor, which two hardware threads of a core share (1.2 to 1.4 times faster beside a busy one).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from runtime.backends.cpu.tile import registers
from runtime.backends.cpu.tile.dots import half_sums
from runtime.backends.cpu.tile.formats import LINE, ROWS
from runtime.backends.cpu.tile.problem import Problem
from runtime.backends.cpu.tile.spec import AMX_COLUMNS, Q_BYTES, SIDE_BYTES
from runtime.backends.cpu.tile.sums_int8 import less_minimum
from runtime.backends.cpu.tile.vector import F32, I32, const, vec

STRETCH = 1024  # elements of K that are unpacked at a time; a multiple of every block
MAX_TILES = 32  # column tiles whose sums wait between two stretches
CODES = 8 * LINE  # bytes of the unpacked codes of 16 rows by 32 elements
SUMS = 4 * ROWS * AMX_COLUMNS  # bytes of the sums of one tile
DOT, X, W = range(0, 4), range(4, 6), range(6, 8)  # tile registers: dots, activations, weights

_WRITE_AFTER = 2  # groups that are multiplied before one is written; it is scaled after all DOT


class AmxScratch:
    """Stack memory of one kernel call.

    weights: a record for each 32 elements: codes of 16 rows, their scales, their minima.
    """

    def __init__(self, p: Problem) -> None:
        self.record = CODES + LINE * (p.layout.scales + minima(p))
        self.weights = p.code.stack(STRETCH // 32 * self.record)
        self.sums = p.code.stack(MAX_TILES * SUMS)
        self.dots = p.code.stack(len(DOT) * SUMS)


def minima(p: Problem) -> int:
    """Vectors of a record that follow its scales."""
    return (1 if p.layout.minimum else 0) + (2 if p.layout.half_minima else 0)


@dataclass(frozen=True)
class _Group:
    """Addresses of one scale group: activations, their side data, the weights' record."""

    x: Any
    side: Any
    record: Any
    part: int  # of its block of 32
    slot: int  # of the tile registers and of the memory for dots


def advance(p: Problem, s: AmxScratch, x: Any, place: Any, span: tuple[Any, Any]) -> list[Any]:
    """Sums of a tile after the elements [start, stop) of K; before them they are at `place`.

    x: address of the packed activations; s.weights: the unpacked weights from `start` on.
    """
    code = p.code
    start, stop = (code.b.udiv(k, const(32)) for k in span)
    sums = [code.load(code.at(place, LINE * c), vec(F32, ROWS), LINE) for c in range(AMX_COLUMNS)]
    several = len(DOT) // p.layout.scales

    def groups(i: Any, n: int = several) -> list[_Group]:
        return [g for j in range(n) for g in _groups(p, s, x, (i, start), j)]

    def whole_turns(i: Any, sums: list[Any]) -> list[Any]:
        sums = _turn(p, s, groups(i), [], sums)
        second = code.at(i, several)
        sums = code.loop(
            second, whole, sums,
            lambda i, v: _turn(p, s, groups(i), groups(code.at(i, -several)), v), several,
        )  # fmt: skip
        return _turn(p, s, [], groups(code.at(whole, -several)), sums)

    def one(i: Any, sums: list[Any]) -> list[Any]:
        few = groups(i, 1)
        for g in few:
            _all(_multiplied(p, g))
        for g in few:
            _all(_written(p, s, g))
        for g in few:
            sums = [step(total) for step, total in zip(_scaled(p, s, g), sums, strict=True)]
        return sums

    length = code.b.and_(code.b.sub(stop, start), const(-several))
    whole = code.at(start, length)
    sums = code.loop(start, whole, sums, whole_turns, length)  # once, or not at all
    return code.loop(whole, stop, sums, one)


def _groups(p: Problem, s: AmxScratch, x: Any, numbers: tuple[Any, Any], j: int) -> list[_Group]:
    """The scale groups of block i + j, where numbers are (i, the first unpacked block)."""
    code, parts = p.code, p.layout.scales
    i, start = numbers
    sides = code.at(x, code.times(p.n_inner, AMX_COLUMNS))
    quants = code.at(x, code.times(code.at(i, j), Q_BYTES * AMX_COLUMNS))
    side = code.at(sides, code.times(code.at(i, j), SIDE_BYTES * AMX_COLUMNS))
    record = code.at(s.weights, code.times(code.at(code.b.sub(i, start), j), s.record))
    return [
        _Group(code.at(quants, Q_BYTES // parts * part), side, record, part, j * parts + part)
        for part in range(parts)
    ]


def _turn(
    p: Problem, s: AmxScratch, now: list[_Group], before: list[_Group], sums: list[Any]
) -> list[Any]:
    """Multiply the groups `now`, which are written two later; scale those of the turn before."""
    count = len(DOT)
    nothing: list[_Group | None] = [None] * count
    under_way = [*(before or nothing), *(now or nothing)]
    for slot in range(count):
        steps: list[Callable[[], None]] = []
        if now:
            steps += _multiplied(p, now[slot])
        written = under_way[count + slot - _WRITE_AFTER]
        if written is not None:
            steps += _written(p, s, written)
        if before:
            sums = _in_between(steps, _scaled(p, s, before[slot]), sums)
        else:
            _all(steps)
    return sums


def _in_between(
    steps: list[Callable[[], None]], columns: list[Callable[[Any], Any]], sums: list[Any]
) -> list[Any]:
    """The steps, evenly among the columns: the sums after these."""
    result, done = [], 0
    for c, (column, total) in enumerate(zip(columns, sums, strict=True)):
        until = -(-len(steps) * (c + 1) // len(columns))
        _all(steps[done:until])
        done = until
        result.append(column(total))
    return result


def _all(steps: list[Callable[[], None]]) -> None:
    for step in steps:
        step()


def _multiplied(p: Problem, g: _Group) -> list[Callable[[], None]]:
    """Steps: dots of 16 rows by 16 columns added to the group's tile register, which is zero."""
    code, dot, x, w = p.code, DOT[g.slot], X[g.slot % 2], W[g.slot % 2]
    weights = code.at(g.record, CODES // p.layout.scales * g.part)

    def multiply() -> None:
        registers.multiply(code, "tdpbssd", dot, x, w)
        for done in (x, w):
            registers.zero(code, done)

    return [
        lambda: registers.load(code, x, g.x, Q_BYTES),
        lambda: registers.load(code, w, weights, LINE),
        multiply,
    ]


def _written(p: Problem, s: AmxScratch, g: _Group) -> list[Callable[[], None]]:
    """Steps: the dots into memory, [column][row]; their register is zero then."""

    def write() -> None:
        registers.store(p.code, DOT[g.slot], p.code.at(s.dots, SUMS * g.slot), LINE)
        registers.zero(p.code, DOT[g.slot])

    return [write]


def _scaled(p: Problem, s: AmxScratch, g: _Group) -> list[Callable[[Any], Any]]:
    """For each column sum -> sum: the float operations of `sums_int8`, in the same order."""
    make = _with_half_minima if p.layout.half_minima else _with_scale
    return [make(p, s, g, c) for c in range(AMX_COLUMNS)]


def _with_scale(p: Problem, s: AmxScratch, g: _Group, c: int) -> Callable[[Any], Any]:
    code = p.code

    def column(total: Any) -> Any:
        value = code.b.fmul(_dot(p, s, g, c), _side(p, g, 0, c))
        total = code.fma(value, _vector(p, g, g.part), total)
        if not p.layout.minimum:
            return total
        return code.fma(_vector(p, g, 1), _side(p, g, 1, c), total)

    return column


def _with_half_minima(p: Problem, s: AmxScratch, g: _Group, c: int) -> Callable[[Any], Any]:
    code = p.code

    def column(total: Any) -> Any:
        halves = tuple(_vector(p, g, i, I32) for i in (2, 3))
        both = half_sums(code, halves, [_side(p, g, i, c, I32) for i in (3, 4)])
        scale, unit = (_vector(p, g, i) for i in (0, 1))
        value = less_minimum(code, (_dot(p, s, g, c), scale), (both, unit))
        return code.fma(value, _side(p, g, 0, c), total)

    return column


def _dot(p: Problem, s: AmxScratch, g: _Group, c: int) -> Any:
    """The dots of a column, as floats."""
    dots = p.code.load(p.code.at(s.dots, SUMS * g.slot + LINE * c), vec(I32, ROWS), LINE)
    return p.code.b.sitofp(dots, vec(F32, ROWS))


def _side(p: Problem, g: _Group, which: int, c: int, kind: Any = F32) -> Any:
    """One kind of side data of a column, in every lane."""
    return p.code.load_splat(p.code.at(g.side, 4 * (which * AMX_COLUMNS + c)), kind)


def _vector(p: Problem, g: _Group, i: int, kind: Any = F32) -> Any:
    """Vector i of those that follow the codes of a record."""
    return p.code.load(p.code.at(g.record, CODES + LINE * i), vec(kind, ROWS), LINE)
