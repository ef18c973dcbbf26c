"""Unpack steps: from the packed planes of a chunk to unsigned codes and float scales.

Each step gives the blocks of 32 elements of one chunk: eight words of codes (functions, so that
the emitter decides where the unpacking happens), the scales and the minimum of `lanes` rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from runtime.backends.cpu.tile.formats import IQ4_VALUES, LINE, ROWS
from runtime.backends.cpu.tile.lookup import lookup
from runtime.backends.cpu.tile.vector import F32, I8, I16, I32, Code, const, vec

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
    first: Any  # a Python int, or an int64 value
    any_byte: bool = False  # codes may be 16 times too large where their scale makes up for it

    def f16(self, base: Any, offset: int) -> Any:
        """One float16 per row, as float32."""
        code, step = self.code, self._rows(2)
        bits = code.load(code.at(base, offset, step), vec(I16, code.lanes))
        return code.half_to_float(bits)

    def byte(self, base: Any, offset: int, signed: bool = False) -> Any:
        """One byte per row, as float32."""
        code, step = self.code, self._rows(1)
        value = code.load(code.at(base, offset, step), vec(I8, code.lanes))
        widen = code.b.sext if signed else code.b.zext
        return code.b.sitofp(widen(value, vec(I32, code.lanes)), vec(F32, code.lanes))

    def word(self, base: Any, offset: int, w: int) -> Any:
        """Word w of a plane: four bytes per row."""
        code, step = self.code, self._rows(4)
        return code.load(code.at(base, offset + LINE * w, step), vec(I8, 4 * code.lanes))

    def _rows(self, width: int) -> Any:
        return offset_of(self.code, self.first, width)


def offset_of(code: Code, first: Any, width: int) -> Any:
    """first * width, where `first` is a Python int or an int64 value."""
    return first * width if isinstance(first, int) else code.times(first, width)


def unpack(name: str, rows: Rows, head: list[Any], chunk: Any, number: Any) -> list[Block]:
    """The blocks of chunk `number` at address `chunk`; head: what `header(name, rows)` gave."""
    return _STEPS[name](rows, head, chunk, number)


def header(name: str, rows: Rows) -> list[Any]:
    """Values that all chunks of a block share: its float scales, for blocks of 256."""
    return [rows.f16(rows.base, at) for at in _HEADERS.get(name, ())]


# ---- codes ------------------------------------------------------------------------------


def _nibbles(rows: Rows, base: Any, offset: int, words: range, high: bool) -> list[Word]:
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


def _nibble_words(rows: Rows, base: Any, offset: int) -> list[Word]:
    """Four planes: elements 0..15 in the low nibbles, 16..31 in the high ones."""
    words = range(4)
    return _nibbles(rows, base, offset, words, False) + _nibbles(rows, base, offset, words, True)


def _with_bits(code: Code, low: Word, bits: Callable[[], Any]) -> Word:
    """A word of codes with further high bits, both as bytes."""

    def emit() -> Any:
        value = low()
        return code.b.or_(value, code.b.bitcast(bits(), value.type))

    return emit


def _moved(code: Code, plane: Any, left: int, mask: int) -> Any:
    """The bits of a plane moved left (right if negative) and masked, byte by byte.

    Shifting 32-bit lanes is one instruction where bytes have none; the mask drops what crosses.
    """
    lanes = code.b.bitcast(plane, vec(I32, code.lanes))
    if left > 0:
        lanes = code.b.shl(lanes, code.fill(I32, left))
    elif left < 0:
        lanes = code.b.lshr(lanes, code.fill(I32, -left))
    return code.b.and_(lanes, code.fill(I32, mask * 0x01010101))


def _five_bit_words(rows: Rows, base: Any, offset: int) -> list[Word]:
    """A plane whose bit w is the fifth bit of word w, then nibble planes."""
    code, fifth = rows.code, rows.word(base, offset, 0)

    def bits(w: int) -> Callable[[], Any]:
        return lambda: _moved(code, fifth, 4 - w, 0x10)

    words = _nibble_words(rows, base, offset + LINE)
    return [_with_bits(code, word, bits(w)) for w, word in enumerate(words)]


# ---- formats of 32 ----------------------------------------------------------------------


def _q8_0(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    def word(w: int) -> Word:
        return lambda: rows.word(base, 2 * ROWS, w)

    return [Block([word(w) for w in range(8)], [rows.f16(base, 0)])]


def _q4_0(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    return [Block(_nibble_words(rows, base, 2 * ROWS), [rows.f16(base, 0)])]


def _q4_1(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    words = _nibble_words(rows, base, 4 * ROWS)
    return [Block(words, [rows.f16(base, 0)], rows.f16(base, 2 * ROWS))]


def _q5_0(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    return [Block(_five_bit_words(rows, base, 2 * ROWS), [rows.f16(base, 0)])]


def _q5_1(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    words = _five_bit_words(rows, base, 4 * ROWS)
    return [Block(words, [rows.f16(base, 0)], rows.f16(base, 2 * ROWS))]


def _iq4_nl(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    def looked_up(word: Word) -> Word:
        return lambda: lookup(rows.code, word(), [v + 128 for v in IQ4_VALUES])

    words = [looked_up(word) for word in _nibble_words(rows, base, 2 * ROWS)]
    return [Block(words, [rows.f16(base, 0)])]


# ---- formats of 256 ---------------------------------------------------------------------


def _q4_k(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    low = _nibbles(rows, base, 4 * ROWS, range(8), high=False)
    if rows.any_byte:
        return _with_k_scales(rows, head, base, [low, _high_as_they_are(rows, base)], 16)
    return _with_k_scales(
        rows, head, base, [low, _nibbles(rows, base, 4 * ROWS, range(8), high=True)]
    )


def _high_as_they_are(rows: Rows, base: Any) -> list[Word]:
    """High nibbles in their place, 16 times the codes: an instruction less, and exact too."""
    code = rows.code

    def word(w: int) -> Word:
        def emit() -> Any:
            packed = rows.word(base, 4 * ROWS, w)
            return code.b.and_(packed, code.fill(I8, 0xF0, packed.type.count))

        return emit

    return [word(w) for w in range(8)]


def _q5_k(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    """Bit i of the high plane belongs to the block's i-th 32 elements."""
    code, halves = rows.code, []
    for part in range(2):
        words = _nibbles(rows, base, 4 * ROWS, range(8), high=part == 1)
        place = code.at(code.times(number, 2), part)
        turn = code.splat(code.b.trunc(code.b.sub(const(4), place), I32))

        def bits(w: int, turn: Any = turn) -> Callable[[], Any]:
            def emit() -> Any:
                plane = code.b.bitcast(rows.word(rows.base, 4 * ROWS, w), turn.type)
                name = f"llvm.fshl.v{code.lanes}i32"
                turned = code.intrinsic(name, turn.type, [plane, plane, turn])
                return code.b.and_(turned, code.fill(I32, 0x10101010))

            return emit

        halves.append([_with_bits(code, word, bits(w)) for w, word in enumerate(words)])
    return _with_k_scales(rows, head, base, halves)


def _with_k_scales(
    rows: Rows, head: list[Any], base: Any, words: list[list[Word]], excess: int = 1
) -> list[Block]:
    """Two blocks with 6-bit scales and minima: scale * d and minimum * -dmin, both exact.

    Codes of the second block are `excess` (a power of two) times too large.
    """
    (d, d_min), code, blocks = head, rows.code, []
    for i, block in enumerate(words):
        unit = code.b.fmul(d, code.fill(F32, 1 / excess)) if i and excess > 1 else d
        scale = code.b.fmul(rows.byte(base, i * ROWS), unit)
        minimum = code.b.fmul(rows.byte(base, (2 + i) * ROWS), code.b.fneg(d_min))
        blocks.append(Block(block, [scale], minimum))
    return blocks


def _q6_k(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    """128 elements: block i has nibbles i // 2 of words 8 (i % 2).., bits 2i of the high plane."""
    code, (d,) = rows.code, head
    low, high = 8 * ROWS, 8 * ROWS + 16 * LINE

    def bits(i: int, w: int) -> Callable[[], Any]:
        return lambda: _moved(code, rows.word(base, high, w), 4 - 2 * i, 0x30)

    blocks = []
    for i in range(4):
        start = 8 * (i % 2)
        words = _nibbles(rows, base, low, range(start, start + 8), i >= 2)
        full = [_with_bits(code, word, bits(i, w)) for w, word in enumerate(words)]
        signed = [rows.byte(base, (2 * i + half) * ROWS, signed=True) for half in (0, 1)]
        blocks.append(Block(full, [code.b.fmul(s, d) for s in signed]))
    return blocks


_HEADERS = {"Q4_K": (0, 2 * ROWS), "Q5_K": (0, 2 * ROWS), "Q6_K": (0,)}
_STEPS = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "IQ4_NL": _iq4_nl,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
