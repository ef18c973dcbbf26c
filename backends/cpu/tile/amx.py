"""AMX tiles: 16 rows by 16 columns at a time, dots of a block by one matrix instruction.

Weights of a group are unpacked once for all columns, as signed bytes in the order the instruction
wants (which is the order of the packed words), with their scales as floats, for a stretch of K.
The integer dots go through memory to the vector registers, where the same float operations follow
as in `sums_int8`: results are bit-identical with those of the VNNI tile.
"""

from __future__ import annotations

from typing import Any

from runtime.backends.cpu.tile.dots import signed_codes
from runtime.backends.cpu.tile.formats import LINE, ROWS
from runtime.backends.cpu.tile.problem import Problem
from runtime.backends.cpu.tile.spec import AMX_COLUMNS, Q_BYTES, SIDE_BYTES
from runtime.backends.cpu.tile.store import store_tile
from runtime.backends.cpu.tile.unpack import Rows, header, unpack
from runtime.backends.cpu.tile.vector import F32, I8, I32, Code, const, ir, vec

STRETCH = 2048  # elements of K that are unpacked at a time; a multiple of every block
MAX_TILES = 32  # column tiles whose sums wait between two stretches
_WORDS = 8 * LINE  # bytes of the unpacked codes of 16 rows by 32 elements
_SUMS = 4 * ROWS * AMX_COLUMNS  # bytes of the sums of one tile
# Tile registers: dots of a few scale groups at once, so that the matrix unit works on the next
# while the vector units scale the last; two turns each for activations and weights.
_AT_ONCE = 4
_DOT, _X, _W = range(0, 4), range(4, 6), range(6, 8)


class AmxScratch:
    """Stack memory of one kernel call."""

    def __init__(self, p: Problem) -> None:
        self.record = _WORDS + LINE * (p.layout.scales + int(p.layout.minimum))
        self.weights = p.code.stack(STRETCH // 32 * self.record)
        self.sums = p.code.stack(MAX_TILES * _SUMS)
        self.dots = p.code.stack(_AT_ONCE * _SUMS)


def configure(p: Problem) -> None:
    """Give the tile registers their shapes: dots 16x16 int32, x 16 columns, w 16 rows."""
    code, place = p.code, p.code.stack(64)
    k = 32 // p.layout.scales
    code.store(ir.Constant(vec(I8, 64), [0] * 64), place, 1)
    code.store(ir.Constant(I8, 1), place)  # palette
    shapes = {_DOT: (AMX_COLUMNS, 4 * ROWS), _X: (AMX_COLUMNS, k), _W: (k // 4, LINE)}
    for tiles, (rows, row_bytes) in shapes.items():
        for tile in tiles:
            code.store(ir.Constant(ir.IntType(16), row_bytes), code.at(place, 16 + 2 * tile), 2)
            code.store(ir.Constant(I8, rows), code.at(place, 48 + tile))
    _call(code, "ldtilecfg", code.pointer(place, I8))


def release(p: Problem) -> None:
    """Give the tile registers back, so that the system need not save them."""
    _call(p.code, "tilerelease")


def one_group(p: Problem, s: AmxScratch, base: Any, group: Any, tiles: tuple[Any, Any]) -> None:
    """All columns of the tiles [first, end), at most MAX_TILES, by the group packed at `base`."""
    code = p.code
    first, end = tiles
    zero = code.fill(F32, 0.0)
    used = code.times(code.b.sub(end, first), _SUMS)
    code.loop(0, used, [], lambda i, _: code.store(zero, code.at(s.sums, i), LINE) or [], LINE)

    def stretch(k: Any, _: list[Any]) -> list[Any]:
        stop = code.smaller(code.at(k, STRETCH), p.n_inner)
        _unpack(p, s, base, k, stop)

        def one_tile(t: Any) -> None:
            place = code.at(s.sums, code.times(code.b.sub(t, first), _SUMS))
            sums = _advance(p, s, code.at(p.x, code.times(t, p.tile_bytes)), place, (k, stop))
            last = code.b.icmp_signed("==", stop, p.n_inner)
            with code.b.if_else(last) as (done, waiting):
                with done:
                    store_tile(p, [sums], [group], 0, t)
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
    floats = list(block.scales) + ([block.minimum] if p.layout.minimum else [])
    for i, value in enumerate(floats):
        code.store(value, code.at(record, _WORDS + LINE * i), LINE)


def _advance(p: Problem, s: AmxScratch, x: Any, place: Any, span: tuple[Any, Any]) -> list[Any]:
    """Sums of a tile after the blocks of a stretch; before it they are at `place`."""
    code = p.code
    kind = vec(F32, ROWS)
    sides = code.at(x, code.times(p.n_inner, AMX_COLUMNS))
    start, stop = (code.b.udiv(k, const(32)) for k in span)
    sums = [code.load(code.at(place, LINE * c), kind, LINE) for c in range(AMX_COLUMNS)]

    def blocks(i: Any, sums: list[Any], n: int) -> list[Any]:
        places = []
        for j in range(n):
            quants = code.at(x, code.times(code.at(i, j), Q_BYTES * AMX_COLUMNS))
            side = code.at(sides, code.times(code.at(i, j), SIDE_BYTES * AMX_COLUMNS))
            record = code.at(s.weights, code.times(code.at(code.b.sub(i, start), j), s.record))
            places.append((side, record))
            for part in range(p.layout.scales):
                _dots(p, s, quants, record, part, j * p.layout.scales + part)
        for j, (side, record) in enumerate(places):
            for part in range(p.layout.scales):
                dots = code.at(s.dots, _SUMS * (j * p.layout.scales + part))
                sums = _scaled(p, dots, side, code.at(record, _WORDS + LINE * part), sums)
            if p.layout.minimum:
                sums = _with_minimum(p, side, record, sums)
        return sums

    several = _AT_ONCE // p.layout.scales
    whole = code.at(start, code.b.and_(code.b.sub(stop, start), const(-several)))
    sums = code.loop(start, whole, sums, lambda i, v: blocks(i, v, several), several)
    return code.loop(whole, stop, sums, lambda i, v: blocks(i, v, 1))


def _dots(p: Problem, s: AmxScratch, quants: Any, record: Any, part: int, which: int) -> None:
    """Dots of one scale group of 16 rows by 16 columns, into memory [column][row]."""
    code, parts = p.code, p.layout.scales
    dot, x, w = _DOT[which], _X[which % 2], _W[which % 2]
    _tile(code, "tilezero", dot)
    _load(code, x, code.at(quants, Q_BYTES // parts * part), Q_BYTES)
    _load(code, w, code.at(record, _WORDS // parts * part), LINE)
    _tile(code, "tdpbssd", dot, x, w)
    target = code.pointer(code.at(s.dots, _SUMS * which), I8)
    _call(code, "tilestored64", ir.Constant(I8, dot), target, const(LINE))


def _scaled(p: Problem, place: Any, side: Any, scale: Any, sums: list[Any]) -> list[Any]:
    code, kind = p.code, vec(F32, ROWS)
    scales = code.load(scale, kind, LINE)
    result = []
    for c, total in enumerate(sums):
        dots = code.load(code.at(place, LINE * c), vec(I32, ROWS), LINE)
        d = code.load_splat(code.at(side, 4 * c), F32)
        result.append(code.fma(code.b.fmul(code.b.sitofp(dots, kind), d), scales, total))
    return result


def _with_minimum(p: Problem, side: Any, record: Any, sums: list[Any]) -> list[Any]:
    code = p.code
    minimum = code.load(code.at(record, _WORDS + LINE * p.layout.scales), vec(F32, ROWS), LINE)
    place = code.at(side, 4 * AMX_COLUMNS)
    return [
        code.fma(minimum, code.load_splat(code.at(place, 4 * c), F32), total)
        for c, total in enumerate(sums)
    ]


def _load(code: Code, tile: int, address: Any, stride: int) -> None:
    _call(code, "tileloadd64", ir.Constant(I8, tile), code.pointer(address, I8), const(stride))


def _tile(code: Code, name: str, *tiles: int) -> None:
    _call(code, name, *(ir.Constant(I8, t) for t in tiles))


def _call(code: Code, name: str, *args: Any) -> None:
    code.intrinsic(f"llvm.x86.{name}", ir.VoidType(), args)
