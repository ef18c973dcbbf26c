"""Unpack steps of the formats whose blocks are short: 32 to 128 elements."""

from __future__ import annotations

from typing import Any

from runtime.backends.cpu.tile.codes import (
    Block,
    Rows,
    Word,
    five_bit_words,
    looked_up,
    moved,
    nibble_words,
    nibbles,
)
from runtime.backends.cpu.tile.formats import LINE, ROWS
from runtime.backends.cpu.tile.source import half_e4m3, half_power
from runtime.backends.cpu.tile.vector import I8, vec
from runtime.ops.blocks import E2M1_LEVELS, IQ4_LEVELS

IQ4_CODES = [v + 128 for v in IQ4_LEVELS]
_E2M1_CODES = [v + 16 for v in E2M1_LEVELS]


def _q8_0(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    def word(w: int) -> Word:
        return lambda: rows.word(base, 2 * ROWS, w)

    return [Block([word(w) for w in range(8)], [rows.f16(base, 0)])]


def _q4_0(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    return [Block(nibble_words(rows, base, 2 * ROWS), [rows.f16(base, 0)])]


def _q4_1(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    words = nibble_words(rows, base, 4 * ROWS)
    return [Block(words, [rows.f16(base, 0)], rows.f16(base, 2 * ROWS))]


def _q5_0(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    return [Block(five_bit_words(rows, base, 2 * ROWS), [rows.f16(base, 0)])]


def _q5_1(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    words = five_bit_words(rows, base, 4 * ROWS)
    return [Block(words, [rows.f16(base, 0)], rows.f16(base, 2 * ROWS))]


def _iq4_nl(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    words = looked_up(rows, nibble_words(rows, base, 2 * ROWS), IQ4_CODES)
    return [Block(words, [rows.f16(base, 0)])]


def _q1_0(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    """Codes 0 and 2: a bit of a plane, moved to bit 1."""
    scale = rows.f16(base, 0)

    def word(plane: int, w: int) -> Word:
        at = 2 * ROWS + LINE * plane
        return lambda: _as_bytes(rows, moved(rows.code, rows.word(base, at, 0), 1 - w, 2))

    return [Block([word(i, w) for w in range(8)], [scale]) for i in range(4)]


def _q2_0(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    """Every plane has four words, two bits of each byte for each."""
    scale = rows.f16(base, 0)

    def word(w: int) -> Word:
        plane, place = divmod(w, 4)
        at = 2 * ROWS + LINE * plane
        return lambda: _as_bytes(rows, moved(rows.code, rows.word(base, at, 0), -2 * place, 3))

    return [Block([word(w) for w in range(i, i + 8)], [scale]) for i in (0, 8)]


def _as_bytes(rows: Rows, lanes: Any) -> Any:
    return rows.code.b.bitcast(lanes, vec(I8, 4 * rows.code.lanes))


def _mxfp4(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    words = looked_up(rows, nibble_words(rows, base, ROWS), _E2M1_CODES)
    return [Block(words, [half_power(rows.code, rows.integer(base, 0))])]


def _nvfp4(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    """Every 16 elements have two words: eight elements in the low nibbles, eight in the high."""
    blocks = []
    for i in range(2):
        parts, scales = [], []
        for j in (2 * i, 2 * i + 1):
            for high in (False, True):
                parts += nibbles(rows, base, 4 * ROWS, range(2 * j, 2 * j + 2), high)
            scales.append(half_e4m3(rows.code, rows.integer(base, j * ROWS)))
        blocks.append(Block(looked_up(rows, parts, _E2M1_CODES), scales))
    return blocks


STEPS = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "IQ4_NL": _iq4_nl,
    "Q1_0": _q1_0,
    "Q2_0": _q2_0,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
}
