"""Int8 tiles for prompts by vector instructions: weights are unpacked once for all columns.

A stretch of K of a few row groups is unpacked into a scratch that stays in the first-level cache:
for each 32 elements a record of codes, scales and minima, in the order of the packed planes. Then
all tiles of columns pass over it. Sums wait in memory from stretch to stretch; they are added up
by the same operations in the same order as in `sums_int8`, so results have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runtime.backends.cpu.tile.blocks import by_groups, by_part, prefetch
from runtime.backends.cpu.tile.codes import Block, Rows, Word
from runtime.backends.cpu.tile.dots import prepared_words
from runtime.backends.cpu.tile.formats import LINE, ROWS
from runtime.backends.cpu.tile.problem import Part, Problem, Span
from runtime.backends.cpu.tile.store import store_tile
from runtime.backends.cpu.tile.sums_amx import CODES, MAX_TILES, minima
from runtime.backends.cpu.tile.sums_int8 import Waiting, X, one_block
from runtime.backends.cpu.tile.unpack import header, unpack
from runtime.backends.cpu.tile.vector import F32, I8, I32, const, vec

COLUMNS = 8  # of the tiles that come here
STRETCH = 256  # elements of K unpacked at a time; a multiple of every block
# Fewer tiles than this lose more by the pauses of unpacking than they save (measured).
_FEW, _FEW_OF_BOOKS = 6, 2
_BOOKS = ("IQ1", "IQ2", "IQ3")

Segment = Callable[[Problem, Any, Span, Span], None]  # (problem, weights, tiles, groups)


class _Scratch:
    """Stack memory of one kernel call: records of several groups, and sums of all tiles."""

    def __init__(self, p: Problem) -> None:
        self.record = CODES + LINE * (p.layout.scales + minima(p))
        self.group = STRETCH // 32 * self.record
        self.weights = p.code.stack(p.groups_at_once * self.group)
        self.tile = p.groups_at_once * COLUMNS * LINE
        self.sums = p.code.stack(MAX_TILES * self.tile)


def segment_of(p: Problem, direct: Segment) -> Segment:
    """(problem, weights, tiles, groups): those groups by those tiles, at most MAX_TILES.

    Few tiles go to `direct`: it reads memory without a pause, which then takes the time.
    """
    scratch = _Scratch(p)

    def segment(p: Problem, w: Any, tiles: Span, groups: Span) -> None:
        count = p.code.b.sub(tiles[1], tiles[0])
        enough = _FEW_OF_BOOKS if p.layout.name.startswith(_BOOKS) else _FEW
        few = p.code.b.icmp_signed("<", count, const(enough))
        with p.code.b.if_else(few) as (streamed, staged):
            with streamed:
                direct(p, w, tiles, groups)
            with staged:
                by_groups(p, groups, lambda some: _some_groups(p, scratch, w, tiles, some))

    return segment


def _some_groups(p: Problem, s: _Scratch, w: Any, tiles: Span, groups: list[Any]) -> None:
    code, (first, end) = p.code, tiles
    bases = [code.at(w, code.times(g, p.group_bytes)) for g in groups]
    apart = code.b.sub(bases[1], bases[0]) if len(bases) > 1 else const(0)
    zero = code.fill(F32, 0.0)
    used = code.times(code.b.sub(end, first), s.tile)
    step = 4 * code.lanes
    code.each(0, used, lambda i: code.store(zero, code.at(s.sums, i), step), step)

    def stretch(k: Any) -> None:
        span = k, code.smaller(code.at(k, STRETCH), p.n_inner)

        def unpacked(i: Any) -> None:
            base = code.at(bases[0], code.times(i, apart))
            _unpack(p, s, base, code.at(s.weights, code.times(i, s.group)), span)

        code.each(0, len(groups), unpacked)

        def one_tile(t: Any) -> None:
            place = code.at(s.sums, code.times(code.b.sub(t, first), s.tile))
            _over_parts(p, lambda row: _one_part(p, s, (groups, bases, row), place, t, span))

        code.each(first, end, one_tile)

    code.each(0, p.n_inner, stretch, STRETCH)


def _over_parts(p: Problem, body: Callable[[Any], None]) -> None:
    """body(first row) for every part of a group that a register holds."""
    if p.code.lanes == ROWS:
        body(0)
    else:
        p.code.each(0, ROWS, body, p.code.lanes)


def _unpack(p: Problem, s: _Scratch, base: Any, place: Any, span: Span) -> None:
    """Records of the elements of `span` of one group, from `place` on."""
    code, layout = p.code, p.layout
    per_chunk, each = layout.chunk // 32, layout.packed_bytes // layout.chunks

    def block(k: Any, row: Any) -> None:
        number = code.b.udiv(k, const(layout.block))
        start = code.at(base, code.times(number, layout.packed_bytes))
        rows = Rows(code, start, row, p.any_byte)
        head = header(layout.name, rows)
        records = code.at(place, code.times(_block_in(p, k, span), s.record))

        def chunk(j: Any) -> None:
            at = code.at(start, code.times(j, layout.chunk_bytes), layout.header)
            prefetch(p, code.at(start, code.times(j, each)), each, row)
            for i, one in enumerate(unpack(layout.name, rows, head, at, j)):
                which = code.at(code.times(j, per_chunk), i)
                _write(p, one, code.at(records, code.times(which, s.record), _bytes(p, row)))

        code.each(0, layout.chunks, chunk)

    _over_parts(p, lambda row: code.each(*span, lambda k: block(k, row), layout.block))


def _block_in(p: Problem, k: Any, span: Span) -> Any:
    """Number of the block of 32 at element k of a stretch."""
    return p.code.b.udiv(p.code.b.sub(k, span[0]), const(32))


def _bytes(p: Problem, row: Any) -> Any:
    """Where a row's lane is in a line."""
    return 4 * row if isinstance(row, int) else p.code.times(row, 4)


def _write(p: Problem, block: Block, record: Any) -> None:
    words = [word() for word in block.words]
    values = [*prepared_words(p.code, p.layout, words, COLUMNS), *block.scales]
    if p.layout.minimum:
        values += [block.minimum, *block.halves]
    for i, value in enumerate(values):
        p.code.store(value, p.code.at(record, LINE * i), 4 * p.code.lanes)


def _read(p: Problem, record: Any) -> Block:
    """What `_write` wrote; codes are read where they are used."""
    code, scales = p.code, p.layout.scales

    def load(i: int, kind: Any, n: int) -> Any:
        return code.load(code.at(record, LINE * i), vec(kind, n), 4 * code.lanes)

    def word(w: int) -> Word:
        return lambda: load(w, I8, 4 * code.lanes)

    words = [word(w) for w in range(8)]
    floats = [load(8 + i, F32, code.lanes) for i in range(scales + int(p.layout.minimum))]
    minimum = floats[scales] if p.layout.minimum else None
    halves = range(2) if p.layout.half_minima else ()
    integers = tuple(load(9 + scales + i, I32, code.lanes) for i in halves)
    return Block(words, floats[:scales], minimum, integers, prepared=True)


def _one_part(p: Problem, s: _Scratch, where: Any, place: Any, t: Any, span: Span) -> None:
    """Some rows of all groups by tile `t`, over `span`; sums wait at `place`."""
    code, (groups, bases, row) = p.code, where
    x = p.tile_address(t)
    sides = code.at(x, code.times(p.n_inner, COLUMNS))
    count = len(groups) * COLUMNS
    place = code.at(place, code.times(const(row) if row == 0 else row, 4 * count))
    sums = Waiting(p, count, place)

    def block(k: Any) -> None:
        at = code.times(_block_in(p, k, span), s.record)
        records = [code.at(s.weights, i * s.group, at, _bytes(p, row)) for i in range(len(groups))]
        number = code.b.udiv(k, const(32))
        blocks = [_read(p, record) for record in records]
        sums.put(one_block(p, blocks, X(p, x, sides, number), sums.get()))

    code.each(*span, block, 32)
    with code.b.if_then(code.b.icmp_signed("==", span[1], p.n_inner)):
        parts = [Part(g, base, row) for g, base in zip(groups, bases, strict=True)]
        store_tile(p, by_part(p, sums.get()), parts, t)
