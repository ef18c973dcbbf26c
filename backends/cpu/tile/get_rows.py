"""Embedding rows picked by number and decoded from the file's blocks, for every format.

Parallel over (row x block), so that one token's row is shared too; plain numbers come in units of
16 instead of blocks. Elements are computed 16 at a time, as numpy does from the same description
(`ops/quant_blocks.py`): in float32, scale times level, then plus the minimum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runtime.backends.cpu.compile.isa import isa
from runtime.backends.cpu.tile.books import book
from runtime.backends.cpu.tile.lookup import lookup
from runtime.backends.cpu.tile.source import Source
from runtime.backends.cpu.tile.spec import GET_ROWS_ARGS
from runtime.backends.cpu.tile.vector import F32, I8, I32, I64, Code, const, ir, undefined, vec
from runtime.ops.blocks import BLOCK_FORMATS, Scale, count_of

LANES = 16
_PLAIN = {"f32": 4, "f16": 2, "bf16": 2}  # bytes


def emit_get_rows(name: str, isa_name: str) -> str:
    """LLVM IR text of the kernel that reads rows of a type; its arguments are `GET_ROWS_ARGS`."""
    code = Code(isa(isa_name))
    row = BLOCK_FORMATS.get(name)
    elements, nbytes = (row.block, row.nbytes) if row else (LANES, LANES * _PLAIN[name])
    args = code.arguments(GET_ROWS_ARGS)
    units = code.ceil_div(args["n"], elements)
    first, end = code.my_share(code.times(code.load(args["live"], I64), units))

    def unit(item: Any) -> None:
        number, i = code.b.udiv(item, units), code.b.urem(item, units)
        picked = code.load(code.at(args["ids"], code.times(number, 4)), I32)
        source = code.times(code.b.sext(picked, I64), args["row_bytes"])
        source = code.at(args["matrix"], source, code.times(i, nbytes))
        start = code.times(i, elements)
        goal = code.at(code.times(number, args["out_stride"]), start)
        goal = code.at(args["out"], code.times(goal, 4))
        if row:
            _block(Source(code, row, source), goal)
        else:
            left = code.smaller(code.b.sub(args["n"], start), const(LANES))
            _plain_unit(code, name, source, goal, left)

    code.each(first, end, unit)
    return code.finish()


def _plain_unit(code: Code, name: str, source: Any, goal: Any, count: Any) -> None:
    """Up to 16 plain numbers."""

    def some(i: Any, n: int) -> None:
        place = code.at(source, code.times(i, _PLAIN[name]))
        bits = code.load(place, vec(ir.IntType(8 * _PLAIN[name]), n))
        if name == "f16":
            bits = code.half_to_float(bits)
        elif name == "bf16":
            bits = code.b.shl(code.b.zext(bits, vec(I32, n)), code.fill(I32, 16, n))
        code.store(code.b.bitcast(bits, vec(F32, n)), code.at(goal, code.times(i, 4)), 4)

    whole = code.b.icmp_signed("==", count, const(LANES))
    with code.b.if_else(whole) as (then, otherwise):
        with then:
            some(const(0), LANES)
        with otherwise:
            code.each(0, count, lambda i: some(i, 1))


def _block(source: Source, goal: Any) -> None:
    """All elements of a block."""
    code, row = source.code, source.row
    scales, minima = _groups(source, row.scale), _groups(source, row.minimum)
    for i in range(0, row.block, LANES):
        value = code.b.fmul(scales(i), _levels(source, i))
        if row.minimum:
            value = code.b.fadd(value, minima(i))
        code.store(value, code.at(goal, 4 * i), 4)


def _groups(source: Source, scale: Scale | None) -> Callable[[int], Any]:
    """A function of an element that gives the scale of its group in all lanes."""
    made: dict[int, Any] = {}
    if scale is None:
        return lambda i: None
    row = source.row
    if row.down:  # levels come as eighths
        scale = scale._replace(unit=scale.unit / 8)
    count = count_of(scale.steps, row) if scale.steps else 1
    if isinstance(scale.base, str):
        count = max(count, row.fields[scale.base].length)

    def of(i: int) -> Any:
        group = i * count // row.block
        if group not in made:
            made[group] = _lanes(source.code, source.scale(scale, group), [0] * LANES)
        return made[group]

    return of


def _levels(source: Source, i: int) -> Any:
    """Levels of 16 elements, float32."""
    code, row = source.code, source.row
    if row.book:
        return _entries(source, i)
    codes = source.numbers(row.codes, i, LANES)
    if row.levels:
        codes = lookup(code, code.b.trunc(codes, vec(I8, LANES)), row.levels)
        codes = code.b.sext(codes, vec(I32, LANES))
    elif row.offset:
        codes = code.b.sub(codes, code.fill(I32, row.offset, LANES))
    return code.b.sitofp(codes, vec(F32, LANES))


def _entries(source: Source, i: int) -> Any:
    """Levels from the code book, with their signs; those of IQ1 are eighths."""
    code, row, b = source.code, source.row, source.code.b
    size = row.block // count_of(row.codes, row)
    loaded = []
    for entry in range(i // size, (i + LANES) // size):
        index = b.extract_element(source.numbers(row.codes, entry, 1), ir.Constant(I32, 0))
        place = b.gep(book(code, row.name.upper()), [b.mul(index, ir.Constant(I32, size))])
        value = b.load(b.bitcast(place, vec(I8, size).as_pointer()))
        value.align = 4
        loaded.append(value)
    while len(loaded) > 1:  # two beside each other, in order
        pairs, lanes = zip(loaded[::2], loaded[1::2], strict=True), range(2 * loaded[0].type.count)
        loaded = [code.shuffle(x, y, lanes) for x, y in pairs]
    codes = b.zext(loaded[0], vec(I32, LANES))
    if row.down:
        return _shifted(source, i, b.sub(codes, code.fill(I32, 16, LANES)))
    levels = b.sitofp(b.sub(codes, code.fill(I32, 128, LANES)), vec(F32, LANES))
    return b.select(_negative(source, i), b.fneg(levels), levels)


def _shifted(source: Source, i: int, eighths: Any) -> Any:
    """Eighths, one less where `down` is set and one more elsewhere."""
    code, row, b = source.code, source.row, source.code.b
    assert row.down is not None, "a format with directions"
    each = row.block // count_of(row.down, row)
    down = source.numbers(row.down, i // each, max(1, LANES // each))
    down = _lanes(code, down, [lane // each for lane in range(LANES)])
    step = b.sub(code.fill(I32, 1, LANES), b.shl(down, code.fill(I32, 1, LANES)))
    return b.sitofp(b.add(eighths, step), vec(F32, LANES))


def _negative(source: Source, i: int) -> Any:
    """Whether elements have a minus sign."""
    code, b = source.code, source.code.b
    signs = _lanes(code, source.sign_bytes(i // 8, LANES // 8), [k // 8 for k in range(LANES)])
    bits = ir.Constant(signs.type, [1 << k % 8 for k in range(LANES)])
    return b.icmp_unsigned("!=", b.and_(signs, bits), code.fill(I32, 0, LANES))


def _lanes(code: Code, value: Any, picks: list[int]) -> Any:
    return code.shuffle(value, undefined(value.type), picks)
