"""Sums over K of one tile with int8 activations.

For every block of 32 (or half block, where the format has a scale for 16) and every column:
    acc = fma(float(dot) * d, scale, acc), then acc = fma(minimum, s, acc) where there is one,
in block order. With minima of halves it is
    acc = fma(fma(float(sum of m * sum(q)), unit, float(dot) * scale), d, acc).
`dot` is exact; d and s = d * sum(q) come with the activations.
"""

from __future__ import annotations

from typing import Any

from runtime.backends.cpu.tile.blocks import Sums, by_part, over_blocks, zeros
from runtime.backends.cpu.tile.codes import Block
from runtime.backends.cpu.tile.dots import dot_words, half_sums
from runtime.backends.cpu.tile.problem import Part, Problem
from runtime.backends.cpu.tile.spec import Q_BYTES, SIDE_BYTES
from runtime.backends.cpu.tile.vector import F32, I32, Broadcasts, Code, vec

# Side data of a block, [5][columns]: scale, scale * sum(q), and -8 * sum(q) of all and each half.
_D, _S, _C, _C_LOW = range(4)
_SUMS_IN_REGISTERS = 8
# Where several blocks of 32 are unpacked together their scales need registers too: all formats of
# x86 with such chunks are 1.0 to 1.5 times faster so (measured), a token's Q6_K by 1.3.
_SUMS_BESIDE_CHUNKS = 4


def sums_int8(p: Problem, parts: list[Part], x: Any) -> Sums:
    """Float sums [part][column] of the packed activation tile at `x`."""
    sides = p.code.at(x, p.code.times(p.n_inner, p.spec.columns))
    start = zeros(p, parts)
    # Dots and sums of 16 vectors each do not fit the registers: the sums, touched once in a
    # block, wait in memory.
    waiting = _on_stack(p, start) if len(start) > _most_in_registers(p) else None

    def body(blocks: list[Block], number: Any, sums: list[Any]) -> list[Any]:
        place = X(p, x, sides, number)
        if waiting is None:
            return one_block(p, blocks, place, sums)
        waiting.put(one_block(p, blocks, place, waiting.get()))
        return []

    if waiting is None:
        return by_part(p, over_blocks(p, parts, body, start))
    over_blocks(p, parts, body, [])
    return by_part(p, waiting.get())


def _most_in_registers(p: Problem) -> int:
    beside_chunks = p.layout.chunk > 32 and not p.code.isa.has_sdot
    return _SUMS_BESIDE_CHUNKS if beside_chunks else _SUMS_IN_REGISTERS


def _on_stack(p: Problem, start: list[Any]) -> Waiting:
    waiting = Waiting(p, len(start), p.code.stack(4 * p.code.lanes * len(start)))
    waiting.put(start)
    return waiting


class Waiting:
    """`count` sums kept in memory at `place`."""

    def __init__(self, p: Problem, count: int, place: Any) -> None:
        self.code, self.kind = p.code, vec(F32, p.code.lanes)
        self.step, self.place, self.count = 4 * p.code.lanes, place, count

    def get(self) -> list[Any]:
        """The sums as they are now."""
        places = (self.code.at(self.place, self.step * i) for i in range(self.count))
        return [self.code.load(place, self.kind, self.step) for place in places]

    def put(self, sums: list[Any]) -> None:
        """Keep new sums."""
        for i, total in enumerate(sums):
            self.code.store(total, self.code.at(self.place, self.step * i), self.step)


class X:
    """One block of a tile of packed activations."""

    def __init__(self, p: Problem, quants: Any, sides: Any, number: Any) -> None:
        self.code, self.columns = p.code, p.spec.columns
        self.quants = p.code.at(quants, p.code.times(number, Q_BYTES * self.columns))
        self.sides = p.code.at(sides, p.code.times(number, SIDE_BYTES * self.columns))

    def words(self, first: int, count: int) -> list[Broadcasts]:
        """For each column the words from `first` on, of four int8 values each."""
        starts = (Q_BYTES * column + 4 * first for column in range(self.columns))
        return [Broadcasts(self.code, self.quants, start, I32, count) for start in starts]

    def side(self, which: int) -> Broadcasts:
        """The 4-byte values of one kind of side data, by column."""
        kind = F32 if which in (_D, _S) else I32
        start = 4 * which * self.columns
        return Broadcasts(self.code, self.sides, start, kind, self.columns)


def one_block(p: Problem, blocks: list[Block], x: X, sums: list[Any]) -> list[Any]:
    """Add one block of 32 to the sums (flat: parts outside, columns inside)."""
    parts = p.layout.scales
    words = 8 // parts
    for part in range(parts):
        start = x.side((_C if parts == 1 else _C_LOW) + part)
        picked = [b.words[part * words : (part + 1) * words] for b in blocks]
        activations = x.words(part * words, words)
        dots = dot_words(p.code, p.layout, picked, activations, start, blocks[0].prepared)
        if p.layout.half_minima:
            return _with_half_minima(p, blocks, dots, x, sums)
        sums = _scaled(p, dots, [b.scales[part] for b in blocks], x, sums)
    return _with_minimum(p, blocks, x, sums) if p.layout.minimum else sums


def _scaled(p: Problem, dots: Any, scales: list[Any], x: X, sums: list[Any]) -> list[Any]:
    code, result, d = p.code, [], x.side(_D)
    for i, total in enumerate(sums):
        g, c = divmod(i, p.spec.columns)
        scale = d[c]
        value = code.b.fmul(code.b.sitofp(dots[g][c], vec(F32, code.lanes)), scale)
        result.append(code.fma(value, scales[g], total))
    return result


def _with_minimum(p: Problem, blocks: list[Block], x: X, sums: list[Any]) -> list[Any]:
    result, s = [], x.side(_S)
    for i, total in enumerate(sums):
        g, c = divmod(i, p.spec.columns)
        result.append(p.code.fma(blocks[g].minimum, s[c], total))
    return result


def _with_half_minima(p: Problem, blocks: list[Block], dots: Any, x: X, sums: Any) -> list[Any]:
    code, result, d = p.code, [], x.side(_D)
    units = [minimum_unit(code, b) for b in blocks]
    starts = [x.side(_C_LOW + h) for h in range(2)]
    for i, total in enumerate(sums):
        g, c = divmod(i, p.spec.columns)
        both = half_sums(code, blocks[g].halves, [start[c] for start in starts])
        scale = d[c]
        dot = code.b.sitofp(dots[g][c], units[g].type)
        value = less_minimum(code, (dot, blocks[g].scales[0]), (both, units[g]))
        result.append(code.fma(value, scale, total))
    return result


def less_minimum(code: Code, dot: tuple[Any, Any], both: tuple[Any, Any]) -> Any:
    """fma(float(both), unit, dot * scale) of (dot, scale) and (both, unit)."""
    product = code.b.fmul(*dot)
    return code.fma(code.b.sitofp(both[0], both[1].type), both[1], product)


def minimum_unit(code: Code, block: Block) -> Any:
    """What `half_sums` is multiplied with: minus an eighth of the minimum."""
    return code.b.fmul(block.minimum, code.fill(F32, -0.125))
