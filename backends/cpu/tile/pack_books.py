"""Pack steps of the code book formats: indices and signs in words, signs with all their bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runtime.backends.cpu.tile.formats import LINE, ROWS, format_of
from runtime.backends.cpu.tile.pack_row import Row
from runtime.backends.cpu.tile.vector import I8, I16, I32, ir


def _chunk(name: str, i: int) -> int:
    """Where chunk i begins."""
    layout = format_of(name)
    return layout.header + i * layout.chunk_bytes


def _bits(row: Row, word: Any, shift: int, mask: int) -> Any:
    b = row.code.b
    return b.and_(b.lshr(word, ir.Constant(I32, shift)), ir.Constant(I32, mask))


def _joined(row: Row, parts: list[Any], width: int) -> Any:
    """Words as one, each `width` bits further up."""
    b, total = row.code.b, ir.Constant(I32, 0)
    for i, part in enumerate(parts):
        total = b.or_(total, b.shl(part, ir.Constant(I32, width * i)))
    return total


def _even(row: Row, seven: Any) -> Any:
    """Seven sign bits with the eighth that makes the number of minus signs even."""
    b = row.code.b
    count = row.code.intrinsic("llvm.ctpop.i32", I32, [seven])
    return b.or_(seven, b.shl(b.and_(count, ir.Constant(I32, 1)), ir.Constant(I32, 7)))


def _put(row: Row, word: Any, to: int) -> None:
    row.code.store(word, row.code.at(row.goal, to, row.code.times(row.row, 4)), 1)


def _signs_and_scale(row: Row, rest: Any, to: int) -> Any:
    """Four times seven sign bits become a word; the four bits after them are given."""
    signs = [_even(row, _bits(row, rest, 7 * g, 127)) for g in range(4)]
    _put(row, _joined(row, signs, 8), to)
    return _bits(row, rest, 28, 15)


def _iq2_xxs(row: Row) -> None:
    row.f16(0, 0)
    scales = []
    for i in range(8):
        to = _chunk("IQ2_XXS", i)
        row.words(2 + 8 * i, to, 1)
        scales.append(_signs_and_scale(row, row.source_word(6 + 8 * i), to + LINE))
    _put(row, _joined(row, scales, 4), 2 * ROWS)


def _iq2_xs(row: Row) -> None:
    """16 bits each: nine of the index, seven signs."""
    row.f16(0, 0)
    highs = []
    for i in range(8):
        to, source = _chunk("IQ2_XS", i), 2 + 8 * i
        pairs = [row.source_word(source), row.source_word(source + 4)]
        each = [_bits(row, pair, shift, 0xFFFF) for pair in pairs for shift in (0, 16)]
        _put(row, _joined(row, [_bits(row, v, 0, 255) for v in each], 8), to)
        signs = [_even(row, _bits(row, v, 9, 127)) for v in each]
        _put(row, _joined(row, signs, 8), to + LINE)
        highs += [_bits(row, v, 8, 1) for v in each]
        row.byte(row.source_byte(66 + i), to + 2 * LINE)
    _put(row, _joined(row, highs, 1), 2 * ROWS)


def _iq2_s(row: Row) -> None:
    row.f16(0, 0)
    for i in range(8):
        to = _chunk("IQ2_S", i)
        row.words(2 + 4 * i, to, 1)
        row.words(34 + 4 * i, to + LINE, 1)
        row.byte(row.source_byte(66 + i), to + 2 * LINE)
        row.byte(row.source_byte(74 + i), to + 2 * LINE + ROWS)


def _iq3_xxs(row: Row) -> None:
    row.f16(0, 0)
    scales = []
    for i in range(8):
        to = _chunk("IQ3_XXS", i)
        row.words(2 + 8 * i, to, 2)
        scales.append(_signs_and_scale(row, row.source_word(66 + 4 * i), to + 2 * LINE))
    _put(row, _joined(row, scales, 4), 2 * ROWS)


def _iq3_s(row: Row) -> None:
    row.f16(0, 0)
    row.words(106, 2 * ROWS, 1)
    for i in range(8):
        to = _chunk("IQ3_S", i)
        row.words(2 + 8 * i, to, 2)
        row.words(74 + 4 * i, to + 2 * LINE, 1)
        row.byte(row.source_byte(66 + i), to + 3 * LINE)


def _iq1_s(row: Row) -> None:
    row.f16(0, 0)
    for i in range(8):
        to = _chunk("IQ1_S", i)
        row.words(2 + 4 * i, to, 1)
        row.f16(34 + 2 * i, to + LINE)


def _iq1_m(row: Row) -> None:
    """Four words of 16 bits hold four scales each, and four bits of the float16."""
    b = row.code.b
    words = [row.source_word(48), row.source_word(52)]
    words = [_bits(row, word, shift, 0xFFFF) for word in words for shift in (0, 16)]
    d = b.trunc(_joined(row, [_bits(row, word, 12, 15) for word in words], 4), I16)
    row.code.store(d, row.code.at(row.goal, row.code.times(row.row, 2)), 1)
    for i in range(8):
        to = _chunk("IQ1_M", i)
        row.words(4 * i, to, 1)
        row.f16(32 + 2 * i, to + LINE)
        scales = _bits(row, words[i // 2], 6 * (i % 2), 63)
        row.byte(b.trunc(scales, I8), to + LINE + 2 * ROWS)


STEPS: dict[str, Callable[[Row], None]] = {
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
}
