"""Unpack steps: from the packed planes of a chunk to unsigned codes and float scales.

Each step gives the blocks of 32 elements of one chunk: eight words of codes (functions, so that
the emitter decides where the unpacking happens), the scales and the minimum of `lanes` rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from runtime.backends.cpu.tile.formats import LINE, ROWS
from runtime.backends.cpu.tile.vector import F32, I8, I16, I32, Code, vec

Word = Callable[[], Any]  # emits the unpacking of one word: <4 * lanes x i8>


@dataclass(frozen=True)
class Block:
    """32 elements of `lanes` rows."""

    words: list[Word]
    scales: list[Any]  # one float vector, or one for each half
    minimum: Any = None


@dataclass(frozen=True)
class Rows:
    """Access to the planes of a packed group for the `lanes` rows from row `first` on."""

    code: Code
    base: Any  # address of the packed block
    first: Any  # int64 or 0

    def f16(self, base: Any, offset: int) -> Any:
        """One float16 per row, as float32."""
        code, step = self.code, self._rows(2)
        bits = code.load(code.at(base, offset, step), vec(I16, code.lanes))
        return code.half_to_float(bits)

    def u8(self, base: Any, offset: Any) -> Any:
        """One unsigned byte per row, as float32."""
        code, step = self.code, self._rows(1)
        whole = code.load(code.at(base, offset, step), vec(I8, code.lanes))
        wide = code.b.zext(whole, vec(I32, code.lanes))
        return code.b.sitofp(wide, vec(F32, code.lanes))

    def word(self, base: Any, offset: int, w: int) -> Any:
        """Word w of a plane: four bytes per row."""
        code, step = self.code, self._rows(4)
        return code.load(code.at(base, offset + LINE * w, step), vec(I8, 4 * code.lanes))

    def _rows(self, width: int) -> Any:
        return 0 if self.first == 0 else self.code.times(self.first, width)


def unpack(name: str, rows: Rows, head: list[Any], chunk: Any, number: Any) -> list[Block]:
    """The blocks of chunk `number` at address `chunk`; head: what `header(name, rows)` gave."""
    return _STEPS[name](rows, head, chunk, number)


def header(name: str, rows: Rows) -> list[Any]:
    """Values that all chunks of a block share: its float scales, for formats of 256."""
    del name
    return []


def low_nibbles(code: Code, packed: Any) -> Any:
    """The low four bits of every byte."""
    return code.b.and_(packed, code.fill(I8, 15, packed.type.count))


def high_nibbles(code: Code, packed: Any) -> Any:
    """The high four bits of every byte."""
    return code.b.lshr(packed, code.fill(I8, 4, packed.type.count))


def _nibble_words(rows: Rows, base: Any, offset: int) -> list[Word]:
    """Four words whose low nibbles are elements 0..15 and high nibbles 16..31."""
    code = rows.code

    def low(w: int) -> Word:
        return lambda: low_nibbles(code, rows.word(base, offset, w))

    def high(w: int) -> Word:
        return lambda: high_nibbles(code, rows.word(base, offset, w))

    return [low(w) for w in range(4)] + [high(w) for w in range(4)]


def _byte_words(rows: Rows, base: Any, offset: int) -> list[Word]:
    def word(w: int) -> Word:
        return lambda: rows.word(base, offset, w)

    return [word(w) for w in range(8)]


def _q8_0(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    return [Block(_byte_words(rows, base, 2 * ROWS), [rows.f16(base, 0)])]


def _q4_0(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    return [Block(_nibble_words(rows, base, 2 * ROWS), [rows.f16(base, 0)])]


_STEPS = {"Q8_0": _q8_0, "Q4_0": _q4_0}
