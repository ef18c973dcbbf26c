"""Unpack steps of the code book formats: indices of 8 (IQ3: 4) elements, signs, scales.

A chunk is one block of 32. Its word plane of indices holds one in each byte, eight bits of them;
sign planes hold a bit for each element, the scales are small integers times a float16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runtime.backends.cpu.tile.books import book, picked
from runtime.backends.cpu.tile.codes import Block, Rows, Word, every_byte
from runtime.backends.cpu.tile.formats import LINE, ROWS
from runtime.backends.cpu.tile.vector import F32, I8, I32, ir, vec


def _lanes(rows: Rows, base: Any, offset: int) -> Any:
    """A word plane as int32, one for each row."""
    return rows.code.b.bitcast(rows.word(base, offset, 0), vec(I32, rows.code.lanes))


def _bits(rows: Rows, lanes: Any, shift: int, mask: int) -> Any:
    """Bits of every lane, those from `shift` on."""
    b, code = rows.code.b, rows.code
    lanes = b.lshr(lanes, code.fill(I32, shift)) if shift else lanes
    return b.and_(lanes, code.fill(I32, mask))


def _nibble(rows: Rows, lanes: Any, number: Any) -> Any:
    """Nibble `number` (an int64 value) of every lane."""
    code, b = rows.code, rows.code.b
    shift = code.splat(b.trunc(code.times(number, 4), I32))
    return b.and_(b.lshr(lanes, shift), code.fill(I32, 15))


def _odd_scale(rows: Rows, d: Any, steps: Any, factor: float) -> Any:
    """d * (2 * steps + 1) * factor, exact for a power of two."""
    code, b = rows.code, rows.code.b
    odd = b.add(b.shl(steps, code.fill(I32, 1)), code.fill(I32, 1))
    scale = b.fmul(b.sitofp(odd, vec(F32, code.lanes)), d)
    return b.fmul(scale, code.fill(F32, factor)) if factor != 1 else scale


def _joined(rows: Rows, low: Any, high: Any, shift: int) -> Any:
    """An index of its low bits and further ones, which go to bit `shift`."""
    return rows.code.b.or_(low, rows.code.b.shl(high, rows.code.fill(I32, shift)))


def _of_eight(rows: Rows, name: str, index: Any, w: int) -> Any:
    """Codes of word w: entries have eight elements, two words."""
    return picked(rows.code, book(rows.code, name), index, 8, 4 * (w % 2))


def _with_signs(rows: Rows, codes: Callable[[int], Any], signs: Any) -> list[Word]:
    """Codes of positive signs (128 + magnitude) turned over where the sign bit is set.

    Bit i of the int32 lanes `signs` is the sign of element i of the block.
    """
    code, b = rows.code, rows.code.b
    n = 4 * code.lanes

    def word(w: int) -> Word:
        def emit() -> Any:
            value, byte = codes(w), every_byte(code, _bits(rows, signs, 8 * (w // 2), 255))
            first = 4 * (w % 2)
            mask = ir.Constant(vec(I8, n), [1 << (first + i % 4) for i in range(n)])
            negative = b.icmp_unsigned("!=", b.and_(byte, mask), code.fill(I8, 0, n))
            return b.select(negative, b.neg(value), value)

        return emit

    return [word(w) for w in range(8)]


def _iq2_xxs(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    index = _lanes(rows, base, 0)
    scale = _nibble(rows, _lanes(rows, rows.base, 2 * ROWS), number)

    def codes(w: int) -> Any:
        return _of_eight(rows, "IQ2_XXS", _bits(rows, index, 8 * (w // 2), 255), w)

    words = _with_signs(rows, codes, _lanes(rows, base, LINE))
    return [Block(words, [_odd_scale(rows, head[0], scale, 0.125)])]


def _iq2_xs(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    """The ninth bit of index g of block b is bit 4b + g of a plane of the header."""
    high = _nibble(rows, _lanes(rows, rows.base, 2 * ROWS), number)
    return _iq2_of_halves(rows, head, base, "IQ2_XS", high, 1, 2 * LINE)


def _iq2_s(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    """Two further bits of each of the four indices are in a byte."""
    high = rows.integer(base, 2 * LINE)
    return _iq2_of_halves(rows, head, base, "IQ2_S", high, 2, 2 * LINE + ROWS)


def _iq2_of_halves(
    rows: Rows, head: list[Any], base: Any, name: str, high: Any, width: int, scales: int
) -> list[Block]:
    """Indices of 8 + width bits; a byte at `scales` has a nibble for each 16 elements."""
    index = _lanes(rows, base, 0)

    def codes(w: int) -> Any:
        low = _bits(rows, index, 8 * (w // 2), 255)
        further = _bits(rows, high, width * (w // 2), (1 << width) - 1)
        return _of_eight(rows, name, _joined(rows, low, further, 8), w)

    both = rows.integer(base, scales)
    halves = [_odd_scale(rows, head[0], _bits(rows, both, 4 * i, 15), 0.125) for i in range(2)]
    return [Block(_with_signs(rows, codes, _lanes(rows, base, LINE)), halves)]


def _iq3(rows: Rows, base: Any, name: str, high: Any, scale: Any) -> list[Block]:
    """Eight indices of four elements; `high` has a ninth bit for each, if given."""
    planes = [_lanes(rows, base, LINE * i) for i in range(2)]

    def codes(w: int) -> Any:
        index = _bits(rows, planes[w // 4], 8 * (w % 4), 255)
        if high is not None:
            index = _joined(rows, index, _bits(rows, high, w, 1), 8)
        return picked(rows.code, book(rows.code, name), index, 4, 0)

    return [Block(_with_signs(rows, codes, _lanes(rows, base, 2 * LINE)), [scale])]


def _iq3_xxs(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    steps = _nibble(rows, _lanes(rows, rows.base, 2 * ROWS), number)
    return _iq3(rows, base, "IQ3_XXS", None, _odd_scale(rows, head[0], steps, 0.25))


def _iq3_s(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    steps = _nibble(rows, _lanes(rows, rows.base, 2 * ROWS), number)
    high = rows.integer(base, 3 * LINE)
    return _iq3(rows, base, "IQ3_S", high, _odd_scale(rows, head[0], steps, 1))


def _iq1(rows: Rows, base: Any, name: str, width: int, down: Callable[[int], Any]) -> list[Word]:
    """Codes less one where `down` (lanes 0 or 1, by index) is set, plus one elsewhere.

    The plane after the indices has 16 bits for each row: three more of every index, `width` apart.
    """
    code, b = rows.code, rows.code.b
    index, high = _lanes(rows, base, 0), rows.pair(base, LINE)

    def word(w: int) -> Word:
        def emit() -> Any:
            low = _bits(rows, index, 8 * (w // 2), 255)
            further = _bits(rows, high, width * (w // 2), 7)
            value = _of_eight(rows, name, _joined(rows, low, further, 8), w)
            step = b.sub(code.fill(I32, 1), b.shl(down(w // 2), code.fill(I32, 1)))
            return b.add(value, every_byte(code, step))

        return emit

    return [word(w) for w in range(8)]


def _iq1_s(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    """The 16 bits end with three of the scale and one of the direction, for all elements."""
    high = rows.pair(base, LINE)
    words = _iq1(rows, base, "IQ1_S", 3, lambda _: _bits(rows, high, 15, 1))
    return [Block(words, [_odd_scale(rows, head[0], _bits(rows, high, 12, 7), 0.125)])]


def _iq1_m(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    """Every index has its direction beside its high bits; a byte has two scales of three bits."""
    high, both = rows.pair(base, LINE), rows.integer(base, LINE + 2 * ROWS)
    words = _iq1(rows, base, "IQ1_M", 4, lambda g: _bits(rows, high, 4 * g + 3, 1))
    halves = [_odd_scale(rows, head[0], _bits(rows, both, 3 * i, 7), 0.125) for i in range(2)]
    return [Block(words, halves)]


STEPS = {
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
}
