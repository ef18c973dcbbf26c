"""Sums of one AMX tile over a stretch of K: matrix instructions, and vector code that scales.

For every scale group (32 elements, or 16 where the format has a scale for each half) the matrix
unit makes 16 x 16 integer dots in a tile register; they go to memory and are added to the float
sums there. A few groups are under way at once: one is multiplied while an earlier one is written
and a still earlier one is scaled, as the units wait for each other otherwise.

Every tile register is zeroed right after its last use: one that holds zeros needs no room in the
processor, which two hardware threads of a core share (1.2 to 1.4 times faster beside a busy one).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runtime.backends.cpu.tile import registers
from runtime.backends.cpu.tile.dots import half_sums
from runtime.backends.cpu.tile.formats import LINE, ROWS
from runtime.backends.cpu.tile.problem import Problem
from runtime.backends.cpu.tile.spec import AMX_COLUMNS, Q_BYTES, SIDE_BYTES
from runtime.backends.cpu.tile.sums_int8 import less_minimum
from runtime.backends.cpu.tile.vector import F32, I32, const, vec

STRETCH = 2048  # elements of K that are unpacked at a time; a multiple of every block
MAX_TILES = 32  # column tiles whose sums wait between two stretches
CODES = 8 * LINE  # bytes of the unpacked codes of 16 rows by 32 elements
SUMS = 4 * ROWS * AMX_COLUMNS  # bytes of the sums of one tile
DOT, X, W = range(0, 4), range(4, 6), range(6, 8)  # tile registers: dots, activations, weights

_WRITE_AFTER, _SCALE_AFTER = 2, 4  # groups that are multiplied before one is written, scaled


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

    def blocks(i: Any, sums: list[Any], n: int) -> list[Any]:
        groups = [g for j in range(n) for g in _groups(p, s, x, (i, start), j)]
        return _pipeline(p, s, groups, sums)

    several = len(DOT) // p.layout.scales
    whole = code.at(start, code.b.and_(code.b.sub(stop, start), const(-several)))
    sums = code.loop(start, whole, sums, lambda i, v: blocks(i, v, several), several)
    return code.loop(whole, stop, sums, lambda i, v: blocks(i, v, 1))


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


def _pipeline(p: Problem, s: AmxScratch, groups: list[_Group], sums: list[Any]) -> list[Any]:
    n = len(groups)
    for step in range(n + _SCALE_AFTER):
        if step < n:
            _multiply(p, groups[step])
        if 0 <= step - _WRITE_AFTER < n:
            _write(p, s, groups[step - _WRITE_AFTER])
        if 0 <= step - _SCALE_AFTER < n:
            sums = _scaled(p, s, groups[step - _SCALE_AFTER], sums)
    return sums


def _multiply(p: Problem, g: _Group) -> None:
    """Dots of 16 rows by 16 columns added to the group's tile register, which is zero."""
    dot, x, w = DOT[g.slot], X[g.slot % 2], W[g.slot % 2]
    registers.load(p.code, x, g.x, Q_BYTES)
    weights = p.code.at(g.record, CODES // p.layout.scales * g.part)
    registers.load(p.code, w, weights, LINE)
    registers.multiply(p.code, "tdpbssd", dot, x, w)
    for done in (x, w):
        registers.zero(p.code, done)


def _write(p: Problem, s: AmxScratch, g: _Group) -> None:
    """The dots into memory, [column][row]; their register is zero then."""
    registers.store(p.code, DOT[g.slot], p.code.at(s.dots, SUMS * g.slot), LINE)
    registers.zero(p.code, DOT[g.slot])


def _scaled(p: Problem, s: AmxScratch, g: _Group, sums: list[Any]) -> list[Any]:
    """The float operations of `sums_int8`, in the same order."""
    if p.layout.half_minima:
        return _with_half_minima(p, s, g, sums)
    code, kind = p.code, vec(F32, ROWS)
    scale = code.load(code.at(g.record, CODES + LINE * g.part), kind, LINE)
    result = []
    for c, total in enumerate(sums):
        place = code.at(s.dots, SUMS * g.slot + LINE * c)
        value = code.b.sitofp(code.load(place, vec(I32, ROWS), LINE), kind)
        value = code.b.fmul(value, code.load_splat(code.at(g.side, 4 * c), F32))
        result.append(code.fma(value, scale, total))
    if not p.layout.minimum:
        return result
    minimum = code.load(code.at(g.record, CODES + LINE), kind, LINE)
    row_sums = code.at(g.side, 4 * AMX_COLUMNS)
    return [
        code.fma(minimum, code.load_splat(code.at(row_sums, 4 * c), F32), total)
        for c, total in enumerate(result)
    ]


def _with_half_minima(p: Problem, s: AmxScratch, g: _Group, sums: list[Any]) -> list[Any]:
    code, kind = p.code, vec(F32, ROWS)
    scale, unit = (code.load(code.at(g.record, CODES + LINE * i), kind, LINE) for i in (0, 1))
    places = [code.at(g.record, CODES + LINE * i) for i in (2, 3)]
    halves = tuple(code.load(place, vec(I32, ROWS), LINE) for place in places)
    result = []
    for c, total in enumerate(sums):
        dot = code.load(code.at(s.dots, SUMS * g.slot + LINE * c), vec(I32, ROWS), LINE)
        places = [code.at(g.side, 4 * (which * AMX_COLUMNS + c)) for which in (3, 4)]
        row_sums = [code.load_splat(place, I32) for place in places]
        value = less_minimum(code, (dot, scale), (half_sums(code, halves, row_sums), unit))
        result.append(code.fma(value, code.load_splat(code.at(g.side, 4 * c), F32), total))
    return result
