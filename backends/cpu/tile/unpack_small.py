"""Unpack steps of the formats whose blocks are short: 32 elements, or 64."""

from __future__ import annotations

from typing import Any

from runtime.backends.cpu.tile.codes import Block, Rows, Word, five_bit_words, nibble_words
from runtime.backends.cpu.tile.formats import IQ4_VALUES, ROWS
from runtime.backends.cpu.tile.lookup import lookup


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
    def looked_up(word: Word) -> Word:
        return lambda: lookup(rows.code, word(), [v + 128 for v in IQ4_VALUES])

    words = [looked_up(word) for word in nibble_words(rows, base, 2 * ROWS)]
    return [Block(words, [rows.f16(base, 0)])]


STEPS = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "IQ4_NL": _iq4_nl,
}
