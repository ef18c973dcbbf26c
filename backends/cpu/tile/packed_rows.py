"""Embedding rows picked by number out of the tiles of a matrix that is multiplied with as well.

Parallel over (row x block) as `get_rows`, whose bits these are: a block's scales are applied to
whole levels, in float32, and only the addition of a minimum rounds. A row is a lane of each plane
of its group; the unpack steps read that lane alone, as if vectors held one row.
"""

from __future__ import annotations

from typing import Any

from runtime.backends.cpu.compile.isa import isa
from runtime.backends.cpu.tile.codes import Block, Rows, Word
from runtime.backends.cpu.tile.formats import ROWS, Format, format_of
from runtime.backends.cpu.tile.spec import PACKED_ROWS_ARGS
from runtime.backends.cpu.tile.unpack import header, unpack
from runtime.backends.cpu.tile.vector import F32, I16, I32, I64, Code, const, undefined, vec
from runtime.ops.errors import OpError

LANES = 16  # elements that are computed at a time


def emit_packed_rows(name: str, isa_name: str) -> str:
    """LLVM IR text of the kernel for a packed format; its arguments are `PACKED_ROWS_ARGS`.

    OpError: a format whose tiles do not give the file's zeros their signs.
    """
    layout = format_of(name)
    if not layout.gives_rows:
        raise OpError(f"rows of {name} are read from the file's blocks, not from tiles")
    code = Code(isa(isa_name))
    code.lanes = 1
    args = code.arguments(PACKED_ROWS_ARGS)
    elements = LANES if layout.is_float else layout.block
    units = code.ceil_div(args["n"], elements)
    first, end = code.my_share(code.times(code.load(args["live"], I64), units))

    def unit(item: Any) -> None:
        number, i = code.b.udiv(item, units), code.b.urem(item, units)
        picked = code.b.zext(code.load(code.at(args["ids"], code.times(number, 4)), I32), I64)
        group, row = code.b.udiv(picked, const(ROWS)), code.b.urem(picked, const(ROWS))
        source = code.at(args["matrix"], code.times(group, args["group_bytes"]))
        source = code.at(source, code.times(i, elements // layout.block * layout.packed_bytes))
        start = code.times(i, elements)
        goal = code.at(code.times(number, args["out_stride"]), start)
        goal = code.at(args["out"], code.times(goal, 4))
        if layout.is_float:
            left = code.smaller(code.b.sub(args["n"], start), const(LANES))
            code.each(0, left, lambda k: _value(code, layout, source, row, k, goal))
        else:
            _chunks(layout, Rows(code, source, row), goal)

    code.each(first, end, unit)
    return code.finish()


def _value(code: Code, layout: Format, source: Any, row: Any, k: Any, goal: Any) -> None:
    """Number k of some of a row; those of BF16 lie two by two."""
    b = code.b
    if layout.name == "BF16":
        pair, half = b.lshr(k, const(1)), b.and_(k, const(1))
        lane = code.at(code.times(code.at(code.times(pair, ROWS), row), 4), code.times(half, 2))
    else:
        lane = code.times(code.at(code.times(k, ROWS), row), layout.source_bytes)
    place = code.at(source, lane)
    if layout.name == "F32":
        value = code.load(place, vec(F32, 1))
    elif layout.name == "F16":
        value = code.half_to_float(code.load(place, vec(I16, 1)))
    else:
        wide = b.zext(code.load(place, vec(I16, 1)), vec(I32, 1))
        value = b.bitcast(b.shl(wide, code.fill(I32, 16)), vec(F32, 1))
    code.store(value, code.at(goal, code.times(k, 4)), 4)


def _chunks(layout: Format, rows: Rows, goal: Any) -> None:
    """All chunks of a row's block."""
    code, head = rows.code, header(layout.name, rows)

    def chunk(j: Any) -> None:
        base = code.at(rows.base, layout.header, code.times(j, layout.chunk_bytes))
        to = code.at(goal, code.times(j, 4 * layout.chunk))
        for k, block in enumerate(unpack(layout.name, rows, head, base, j)):
            for half in range(2):
                value = _half(code, layout, block, half)
                code.store(value, code.at(to, 4 * (32 * k + LANES * half)), 4)

    code.each(0, layout.chunks, chunk)


def _half(code: Code, layout: Format, block: Block, half: int) -> Any:
    """16 elements of a block of 32."""
    b, scale = code.b, block.scales[half if len(block.scales) > 1 else 0]
    codes = b.zext(_joined(code, block.words[4 * half : 4 * half + 4]), vec(I32, LANES))
    if layout.offset:
        codes = b.sub(codes, code.fill(I32, layout.offset, LANES))
    value = b.fmul(_everywhere(code, scale), b.sitofp(codes, vec(F32, LANES)))
    minimum = block.minimum
    if minimum is None:
        return value
    if block.halves:
        minimum = b.fmul(minimum, b.sitofp(block.halves[half], minimum.type))
    return b.fadd(value, _everywhere(code, minimum))


def _joined(code: Code, words: list[Word]) -> Any:
    """The bytes of words, in order."""
    found = [word() for word in words]
    while len(found) > 1:
        lanes = range(2 * found[0].type.count)
        found = [code.shuffle(x, y, lanes) for x, y in zip(found[::2], found[1::2], strict=True)]
    return found[0]


def _everywhere(code: Code, value: Any) -> Any:
    """The one lane of a vector in all of 16."""
    return code.shuffle(value, undefined(value.type), [0] * LANES)
