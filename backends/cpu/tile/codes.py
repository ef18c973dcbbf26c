"""What unpack steps are written in: access to packed planes, words of codes, blocks of 32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from runtime.backends.cpu.tile.formats import LINE
from runtime.backends.cpu.tile.lookup import lookup
from runtime.backends.cpu.tile.vector import F32, I8, I16, I32, Code, const, undefined, vec

Word = Callable[[], Any]  # emits the unpacking of one word: <4 * lanes x i8>


@dataclass(frozen=True)
class Block:
    """32 elements of `lanes` rows.

    Where there are `halves`, the minimum of each half of the block is `minimum` times its integers.
    """

    words: list[Word]
    scales: list[Any]  # one float vector, or one for each half
    minimum: Any = None
    halves: tuple[Any, ...] = ()
    prepared: bool = False  # words are what `dots.prepared_words` gave


@dataclass(frozen=True)
class Rows:
    """Access to the planes of a packed group for the `lanes` rows from row `first` on."""

    code: Code
    base: Any  # address of the packed block
    first: Any  # a Python int, or an int64 value
    any_byte: bool = False  # codes may be 16 times too large where their scale makes up for it

    def f16(self, base: Any, offset: int) -> Any:
        """One float16 per row, as float32."""
        code, step = self.code, self._rows(2)
        bits = code.load(code.at(base, offset, step), vec(I16, code.lanes))
        return code.half_to_float(bits)

    def byte(self, base: Any, offset: int, signed: bool = False) -> Any:
        """One byte per row, as float32."""
        value = self.integer(base, offset, signed)
        return self.code.b.sitofp(value, vec(F32, self.code.lanes))

    def integer(self, base: Any, offset: int, signed: bool = False) -> Any:
        """One byte per row, as int32."""
        code, step = self.code, self._rows(1)
        value = code.load(code.at(base, offset, step), vec(I8, code.lanes))
        widen = code.b.sext if signed else code.b.zext
        return widen(value, vec(I32, code.lanes))

    def pair(self, base: Any, offset: int) -> Any:
        """Two bytes per row, as int32."""
        code, step = self.code, self._rows(2)
        value = code.load(code.at(base, offset, step), vec(I16, code.lanes))
        return code.b.zext(value, vec(I32, code.lanes))

    def word(self, base: Any, offset: int, w: int) -> Any:
        """Word w of a plane: four bytes per row."""
        code, step = self.code, self._rows(4)
        return code.load(code.at(base, offset + LINE * w, step), vec(I8, 4 * code.lanes))

    def _rows(self, width: int) -> Any:
        return offset_of(self.code, self.first, width)


def offset_of(code: Code, first: Any, width: int) -> Any:
    """first * width, where `first` is a Python int or an int64 value."""
    return first * width if isinstance(first, int) else code.times(first, width)


def nibbles(rows: Rows, base: Any, offset: int, words: range, high: bool) -> list[Word]:
    """Words of four-bit codes: the low or the high nibbles of word planes."""
    code, b = rows.code, rows.code.b

    def word(w: int) -> Word:
        def emit() -> Any:
            packed = rows.word(base, offset, w)
            if high:
                return b.lshr(packed, code.fill(I8, 4, packed.type.count))
            return b.and_(packed, code.fill(I8, 15, packed.type.count))

        return emit

    return [word(w) for w in words]


def nibble_words(rows: Rows, base: Any, offset: int) -> list[Word]:
    """Four planes: elements 0..15 in the low nibbles, 16..31 in the high ones."""
    words = range(4)
    return nibbles(rows, base, offset, words, False) + nibbles(rows, base, offset, words, True)


def with_bits(code: Code, low: Word, bits: Callable[[], Any]) -> Word:
    """A word of codes with further high bits, both as bytes."""

    def emit() -> Any:
        value = low()
        return code.b.or_(value, code.b.bitcast(bits(), value.type))

    return emit


def moved(code: Code, plane: Any, left: int, mask: int) -> Any:
    """The bits of a plane moved left (right if negative) and masked, byte by byte.

    Shifting 32-bit lanes is one instruction where bytes have none; the mask drops what crosses.
    """
    lanes = code.b.bitcast(plane, vec(I32, code.lanes))
    if left > 0:
        lanes = code.b.shl(lanes, code.fill(I32, left))
    elif left < 0:
        lanes = code.b.lshr(lanes, code.fill(I32, -left))
    return code.b.and_(lanes, code.fill(I32, mask * 0x01010101))


def five_bit_words(rows: Rows, base: Any, offset: int) -> list[Word]:
    """A plane whose bit w is the fifth bit of word w, then nibble planes."""
    code, fifth = rows.code, rows.word(base, offset, 0)

    def bits(w: int) -> Callable[[], Any]:
        return lambda: moved(code, fifth, 4 - w, 0x10)

    words = nibble_words(rows, base, offset + LINE)
    return [with_bits(code, word, bits(w)) for w, word in enumerate(words)]


def two_bit_words(rows: Rows, offset: int, number: Any) -> list[Word]:
    """Eight words of two-bit codes: 32 elements of a block of 256, the `number`th of them.

    Every four of them share eight word planes, of which each has two bits of every byte.
    """
    code, b = rows.code, rows.code.b
    shift = code.splat(b.trunc(code.times(b.and_(number, const(3)), 2), I32))
    planes = code.at(rows.base, code.times(b.lshr(number, const(2)), 8 * LINE))

    def word(w: int) -> Word:
        def emit() -> Any:
            plane = rows.word(planes, offset, w)
            moved = b.lshr(b.bitcast(plane, shift.type), shift)
            return b.bitcast(b.and_(moved, code.fill(I32, 0x03030303)), plane.type)

        return emit

    return [word(w) for w in range(8)]


def looked_up(rows: Rows, words: list[Word], table: list[int]) -> list[Word]:
    """table[code] for words of four-bit codes."""

    def entries(word: Word) -> Word:
        return lambda: lookup(rows.code, word(), table)

    return [entries(word) for word in words]


def every_byte(code: Code, lanes: Any) -> Any:
    """The low byte of every 32-bit lane in all four of its bytes."""
    picks = [4 * (i // 4) for i in range(4 * code.lanes)]
    return _shuffled(code, code.b.bitcast(lanes, vec(I8, len(picks))), picks)


def both_halves(code: Code, lanes: Any) -> Any:
    """The low 16 bits of every 32-bit lane in both of its halves."""
    picks = [2 * (i // 2) for i in range(2 * code.lanes)]
    return _shuffled(code, code.b.bitcast(lanes, vec(I16, len(picks))), picks)


def _shuffled(code: Code, value: Any, picks: list[int]) -> Any:
    return code.shuffle(value, undefined(value.type), picks)
