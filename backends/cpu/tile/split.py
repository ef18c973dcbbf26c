"""BF16 weights by AMX, with activations split in three bfloat16 pieces.

x = x1 + x2 + x3 exactly, each piece the leading eight bits of what is left, so that products with
bfloat16 weights lose nothing. For every 32 elements of K and each piece in turn the instruction
adds, to a float32 sum, the sum of the even elements' products and that of the odd ones.
The same instruction serves every number of columns: a tile just has that many rows.

With many columns K goes in stretches, so that the weights of a few groups stay in the first-level
cache while all activation tiles pass; sums wait in memory from stretch to stretch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runtime.backends.cpu.tile import registers
from runtime.backends.cpu.tile.blocks import Sums, by_groups, by_part, prefetch
from runtime.backends.cpu.tile.formats import LINE, ROWS
from runtime.backends.cpu.tile.problem import Part, Problem, Span
from runtime.backends.cpu.tile.spec import PIECES
from runtime.backends.cpu.tile.store import store_tile
from runtime.backends.cpu.tile.vector import F32, const, vec

STRETCH = 128  # elements of K whose weights, of four groups, leave room in the first-level cache
MAX_TILES = 16  # column tiles whose sums wait between two stretches
_TOTAL, _X, _W = range(0, 4), range(4, 7), (7,)  # a total for each row group, an x for each piece
_BLOCK = ROWS * LINE  # bytes of 16 rows by 32 weights
_STREAMED = 4  # with so few columns weights come from memory, once


def shapes(p: Problem) -> dict[Sequence[int], tuple[int, int]]:
    """Tile registers: sums [column][row], activations of 32 elements, weights in pairs."""
    columns = p.spec.columns
    return {_TOTAL: (columns, 4 * ROWS), _X: (columns, LINE), _W: (ROWS, LINE)}


def segment_of(p: Problem) -> Any:
    """(problem, weights, tiles, groups): those groups by those tiles, at most MAX_TILES."""
    size = p.spec.columns * LINE
    scratch = p.code.stack(MAX_TILES * len(_TOTAL) * size)

    def segment(p: Problem, w: Any, tiles: Span, groups: Span) -> None:
        by_groups(p, groups, lambda some: _some_groups(p, scratch, w, tiles, some))

    return segment


def _some_groups(p: Problem, scratch: Any, w: Any, tiles: Span, groups: list[Any]) -> None:
    code, size = p.code, p.spec.columns * LINE
    parts = [Part(g, code.at(w, code.times(g, p.group_bytes)), 0) for g in groups]
    step = p.n_inner if p.spec.columns <= _STREAMED else const(STRETCH)

    def stretch(i: Any) -> None:
        k = code.times(i, step)
        span = k, code.smaller(code.at(k, step), p.n_inner)

        def one_tile(t: Any) -> None:
            place = code.at(scratch, code.times(code.b.sub(t, tiles[0]), len(_TOTAL) * size))
            _advance(p, parts, p.tile_address(t), place, span)
            with code.b.if_then(code.b.icmp_signed("==", span[1], p.n_inner)):
                store_tile(p, _read(p, place, len(parts)), parts, t)

        code.each(*tiles, one_tile)

    code.each(0, code.b.udiv(code.at(p.n_inner, step, -1), step), stretch)


def _advance(p: Problem, parts: list[Part], x: Any, place: Any, span: Span) -> None:
    """Add the elements of `span` to the sums at `place` (which start as zero, as the registers)."""
    code, columns = p.code, p.spec.columns
    totals = _TOTAL[: len(parts)]
    with code.b.if_then(code.b.icmp_signed(">", span[0], const(0))):
        for i, total in enumerate(totals):
            registers.load(code, total, code.at(place, i * columns * LINE), LINE)

    def block(i: Any) -> None:
        pieces = code.at(x, code.times(i, PIECES * columns * LINE))
        for piece, tile in enumerate(_X):
            registers.load(code, tile, code.at(pieces, piece * columns * LINE), LINE)
        for part, total in zip(parts, totals, strict=True):
            weights = code.at(part.base, code.times(i, _BLOCK))
            if columns <= _STREAMED:
                prefetch(p, weights, _BLOCK)
            registers.load(code, _W[0], weights, LINE)
            for tile in _X:
                registers.multiply(code, "tdpbf16ps", total, tile, _W[0])
            registers.zero(code, _W[0])  # zeroed registers: see sums_amx
        for tile in _X:
            registers.zero(code, tile)

    first, stop = (code.b.udiv(k, const(32)) for k in span)
    code.each(first, stop, block)
    for i, total in enumerate(totals):
        registers.store(code, total, code.at(place, i * columns * LINE), LINE)
        registers.zero(code, total)


def _read(p: Problem, place: Any, n_groups: int) -> Sums:
    """The sums at `place` as vectors, [part][column]."""
    code, columns = p.code, p.spec.columns
    flat = [
        code.load(code.at(place, LINE * i), vec(F32, ROWS), LINE) for i in range(n_groups * columns)
    ]
    return by_part(p, flat)
