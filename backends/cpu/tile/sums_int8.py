"""Sums over K of one tile with int8 activations.

For every block of 32 (or half block, where the format has a scale for 16) and every column:
    acc = fma(float(dot) * d, scale, acc), then acc = fma(minimum, s, acc) where there is one,
in block order. `dot` is exact; d and s = d * sum(q) come with the activations.
"""

from __future__ import annotations

from typing import Any

from runtime.backends.cpu.tile.dots import dot_words
from runtime.backends.cpu.tile.formats import LINE
from runtime.backends.cpu.tile.problem import Problem
from runtime.backends.cpu.tile.spec import Q_BYTES, SIDE_BYTES
from runtime.backends.cpu.tile.unpack import Block, Rows, header, unpack
from runtime.backends.cpu.tile.vector import F32, const, vec

# Side data of a block: [5][columns], see the ABI of packed activations.
_D, _S, _C, _C_LOW, _C_HIGH = range(5)
_AHEAD = 4096  # bytes between what is multiplied and what is asked from memory


def sums_int8(p: Problem, bases: list[Any], x: Any, first: Any) -> list[list[Any]]:
    """Float sums [row group][column] of `lanes` rows from row `first` of each group."""
    code, layout = p.code, p.layout
    zeros = [code.fill(F32, 0.0) for _ in range(len(bases) * p.spec.columns)]
    quants = x
    sides = code.at(x, code.times(p.n_inner, p.spec.columns))

    def block(i: Any, sums: list[Any]) -> list[Any]:
        rows = [
            Rows(code, code.at(base, code.times(i, layout.packed_bytes)), first) for base in bases
        ]
        heads = [header(layout.name, r) for r in rows]
        before = code.times(i, layout.block // 32)
        return _chunks(p, rows, heads, (quants, sides, before), sums)

    n_blocks = code.b.udiv(p.n_inner, const(layout.block))
    sums = code.loop(0, n_blocks, zeros, block)
    columns = p.spec.columns
    return [sums[g * columns : (g + 1) * columns] for g in range(len(bases))]


def _chunks(p: Problem, rows: list[Rows], heads: Any, x: Any, sums: list[Any]) -> list[Any]:
    """All chunks of one block, in a loop of its own when there are several."""
    code, layout = p.code, p.layout
    quants, sides, before = x

    def chunk(j: Any, sums: list[Any]) -> list[Any]:
        offset = code.at(code.times(j, layout.chunk_bytes), layout.header)
        at = [code.at(r.base, offset) for r in rows]
        for base in at:
            _prefetch(p, base)
        blocks = [unpack(layout.name, r, h, a, j) for r, h, a in zip(rows, heads, at, strict=True)]
        n = layout.chunk // 32
        for k in range(n):
            number = code.at(before, code.times(j, n), k)
            sums = _one_block(p, [b[k] for b in blocks], _X(p, quants, sides, number), sums)
        return sums

    if layout.chunks == 1:
        return chunk(const(0), sums)
    return code.loop(0, layout.chunks, sums, chunk)


def _prefetch(p: Problem, base: Any) -> None:
    for line in range(0, p.layout.chunk_bytes, LINE):
        p.code.prefetch(p.code.at(base, _AHEAD + line))


class _X:
    """Addresses in one block of a tile of packed activations."""

    def __init__(self, p: Problem, quants: Any, sides: Any, number: Any) -> None:
        self.code, self.columns = p.code, p.spec.columns
        self.quants = p.code.at(quants, p.code.times(number, Q_BYTES * self.columns))
        self.sides = p.code.at(sides, p.code.times(number, SIDE_BYTES * self.columns))

    def word(self, column: int, w: int) -> Any:
        """Address of the four int8 values of word w."""
        return self.code.at(self.quants, Q_BYTES * column + 4 * w)

    def side(self, which: int, column: int) -> Any:
        """Address of a 4-byte value of the side data."""
        return self.code.at(self.sides, 4 * (which * self.columns + column))


def _one_block(p: Problem, blocks: list[Block], x: _X, sums: list[Any]) -> list[Any]:
    """Add one block of 32 to the sums [row group * column]."""
    parts = p.layout.scales
    words = 8 // parts
    for part in range(parts):
        start = (_C if parts == 1 else _C_LOW) + part

        def word(c: int, w: int, skip: int = part * words) -> Any:
            return x.word(c, skip + w)

        def correction(c: int, which: int = start) -> Any:
            return x.side(which, c)

        picked = [b.words[part * words : (part + 1) * words] for b in blocks]
        dots = dot_words(p.code, p.layout, picked, p.spec.columns, word, correction)
        sums = _scaled(p, dots, [b.scales[part] for b in blocks], x, sums)
    return _with_minimum(p, blocks, x, sums) if p.layout.minimum else sums


def _scaled(p: Problem, dots: Any, scales: list[Any], x: _X, sums: list[Any]) -> list[Any]:
    code, columns = p.code, p.spec.columns
    result = []
    for i, total in enumerate(sums):
        g, c = divmod(i, columns)
        d = code.load_splat(x.side(_D, c), F32)
        value = code.b.fmul(code.b.sitofp(dots[g][c], vec(F32, code.lanes)), d)
        result.append(code.fma(value, scales[g], total))
    return result


def _with_minimum(p: Problem, blocks: list[Block], x: _X, sums: list[Any]) -> list[Any]:
    code, columns = p.code, p.spec.columns
    result = []
    for i, total in enumerate(sums):
        g, c = divmod(i, columns)
        s = code.load_splat(x.side(_S, c), F32)
        result.append(code.fma(blocks[g].minimum, s, total))
    return result
