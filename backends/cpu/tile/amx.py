"""AMX tiles: 16 rows by 16 columns at a time, dots of a block by one matrix instruction.

Weights of a group are unpacked once for all columns, as signed bytes in the order the instruction
wants (which is the order of the packed words), with their scales as floats, for a stretch of K.
The integer dots go through memory to the vector registers, where the same float operations follow
as in `sums_int8`: results are bit-identical with those of the VNNI tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from runtime.backends.cpu.tile.codes import Rows
from runtime.backends.cpu.tile.dots import signed_codes
from runtime.backends.cpu.tile.formats import LINE, ROWS
from runtime.backends.cpu.tile.problem import Part, Problem, Span
from runtime.backends.cpu.tile.spec import AMX_COLUMNS
from runtime.backends.cpu.tile.store import store_tile
from runtime.backends.cpu.tile.sums_amx import (
    CODES,
    DOT,
    STRETCH,
    SUMS,
    AmxScratch,
    W,
    X,
    advance,
)
from runtime.backends.cpu.tile.sums_int8 import minimum_unit
from runtime.backends.cpu.tile.unpack import header, unpack
from runtime.backends.cpu.tile.vector import F32, const


def shapes(p: Problem) -> dict[Sequence[int], tuple[int, int]]:
    """Tile registers: dots 16 columns x 16 rows int32, activations, weights of a scale group."""
    k = 32 // p.layout.scales
    return {DOT: (AMX_COLUMNS, 4 * ROWS), X: (AMX_COLUMNS, k), W: (k // 4, LINE)}


def segment_of(p: Problem) -> Callable[[Problem, Any, Span, Span], None]:
    """(problem, weights, tiles, groups): those groups by those tiles, at most MAX_TILES."""
    scratch = AmxScratch(p)

    def segment(p: Problem, w: Any, tiles: Span, groups: Span) -> None:
        def group(g: Any) -> None:
            _one_group(p, scratch, p.code.at(w, p.code.times(g, p.group_bytes)), g, tiles)

        p.code.each(*groups, group)

    return segment


def _one_group(p: Problem, s: AmxScratch, base: Any, group: Any, tiles: Span) -> None:
    """All columns of the tiles [first, end) by the group packed at `base`."""
    code = p.code
    first, end = tiles
    zero = code.fill(F32, 0.0)
    used = code.times(code.b.sub(end, first), SUMS)
    code.each(0, used, lambda i: code.store(zero, code.at(s.sums, i), LINE), LINE)

    def stretch(k: Any, _: list[Any]) -> list[Any]:
        stop = code.smaller(code.at(k, STRETCH), p.n_inner)
        _unpack(p, s, base, k, stop)

        def one_tile(t: Any) -> None:
            place = code.at(s.sums, code.times(code.b.sub(t, first), SUMS))
            sums = advance(p, s, p.tile_address(t), place, (k, stop))
            last = code.b.icmp_signed("==", stop, p.n_inner)
            with code.b.if_else(last) as (done, waiting):
                with done:
                    store_tile(p, [sums], [Part(group, base, 0)], t)
                with waiting:
                    for c, total in enumerate(sums):
                        code.store(total, code.at(place, LINE * c), LINE)

        code.each(first, end, one_tile)
        return []

    code.loop(0, p.n_inner, [], stretch, step=STRETCH)


def _unpack(p: Problem, s: AmxScratch, base: Any, start: Any, stop: Any) -> None:
    """Codes and scales of elements start..stop of a group, a record for each 32."""
    code, layout = p.code, p.layout

    def block(k: Any, _: list[Any]) -> list[Any]:
        number = code.b.udiv(k, const(layout.block))
        rows = Rows(code, code.at(base, code.times(number, layout.packed_bytes)), 0)
        head = header(layout.name, rows)
        place = code.b.udiv(code.b.sub(k, start), const(32))
        record = code.at(s.weights, code.times(place, s.record))
        per_chunk = layout.chunk // 32

        def chunk(j: Any) -> None:
            at = code.at(rows.base, code.times(j, layout.chunk_bytes), layout.header)
            for i, one in enumerate(unpack(layout.name, rows, head, at, j)):
                which = code.at(code.times(j, per_chunk), i)
                _write_record(p, one, code.at(record, code.times(which, s.record)))

        code.each(0, layout.chunks, chunk)
        return []

    code.loop(start, stop, [], block, step=layout.block)


def _write_record(p: Problem, block: Any, record: Any) -> None:
    code = p.code
    for w, word in enumerate(block.words):
        code.store(signed_codes(code, p.layout, word()), code.at(record, LINE * w), LINE)
    rest = list(block.scales)
    if p.layout.half_minima:
        rest += [minimum_unit(code, block), *block.halves]
    elif p.layout.minimum:
        rest.append(block.minimum)
    for i, value in enumerate(rest):
        code.store(value, code.at(record, CODES + LINE * i), LINE)
