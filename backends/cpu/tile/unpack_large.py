"""Unpack steps of the formats with blocks of 256, whose scales are themselves quantised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runtime.backends.cpu.tile.codes import (
    Block,
    Rows,
    Word,
    both_halves,
    every_byte,
    looked_up,
    moved,
    nibble_words,
    nibbles,
    two_bit_words,
    with_bits,
)
from runtime.backends.cpu.tile.formats import LINE, ROWS
from runtime.backends.cpu.tile.unpack_small import IQ4_CODES
from runtime.backends.cpu.tile.vector import F32, I8, I16, I32, Code, const, vec


def _q4_k(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    low = nibbles(rows, base, 4 * ROWS, range(8), high=False)
    if rows.any_byte:
        return _with_k_scales(rows, head, base, [low, _high_as_they_are(rows, base)], 16)
    return _with_k_scales(
        rows, head, base, [low, nibbles(rows, base, 4 * ROWS, range(8), high=True)]
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
        words = nibbles(rows, base, 4 * ROWS, range(8), high=part == 1)
        place = code.at(code.times(number, 2), part)
        turn = code.splat(code.b.trunc(code.b.sub(const(4), place), I32))

        def bits(w: int, turn: Any = turn) -> Callable[[], Any]:
            def emit() -> Any:
                plane = code.b.bitcast(rows.word(rows.base, 4 * ROWS, w), turn.type)
                name = f"llvm.fshl.v{code.lanes}i32"
                turned = code.intrinsic(name, turn.type, [plane, plane, turn])
                return code.b.and_(turned, code.fill(I32, 0x10101010))

            return emit

        halves.append([with_bits(code, word, bits(w)) for w, word in enumerate(words)])
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
        return lambda: moved(code, rows.word(base, high, w), 4 - 2 * i, 0x30)

    blocks = []
    for i in range(4):
        start = 8 * (i % 2)
        words = nibbles(rows, base, low, range(start, start + 8), i >= 2)
        full = [with_bits(code, word, bits(i, w)) for w, word in enumerate(words)]
        signed = [rows.byte(base, (2 * i + half) * ROWS, signed=True) for half in (0, 1)]
        blocks.append(Block(full, [code.b.fmul(s, d) for s in signed]))
    return blocks


def _iq4_xs(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    blocks = []
    for i in range(2):
        words = nibble_words(rows, base, 2 * ROWS + 4 * i * LINE)
        scale = rows.code.b.fmul(rows.byte(base, i * ROWS, signed=True), head[0])
        blocks.append(Block(looked_up(rows, words, IQ4_CODES), [scale]))
    return blocks


def _q2_k(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    """A code is two bits times four bits of scale; a scale's byte has four of minimum above."""
    code, (d, d_min) = rows.code, head
    both = [rows.integer(base, half * ROWS) for half in range(2)]
    scales = [both_halves(code, code.b.and_(v, code.fill(I32, 15))) for v in both]
    words = two_bit_words(rows, 4 * ROWS, number)
    products = [_scaled(code, word, scales[w // 4]) for w, word in enumerate(words)]
    steps = tuple(code.b.lshr(v, code.fill(I32, 4)) for v in both)
    return [Block(products, [d], code.b.fneg(d_min), steps)]


def _scaled(code: Code, word: Word, factor: Any) -> Word:
    """Codes times a factor of their row, in both 16-bit halves of a lane; products are bytes."""

    def emit() -> Any:
        codes = word()
        return code.b.bitcast(code.b.mul(code.b.bitcast(codes, factor.type), factor), codes.type)

    return emit


def _q3_k(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    """A weight is (u - 4) * scale * d, where u has three bits.

    The integers scale * (u - 4) are signed bytes, all but -4 * -32: codes are 128 less the
    integer, and the float scale is -d.
    """
    code, (d,) = rows.code, head
    turned = [_Turned(code, rows.integer(base, half * ROWS, True)) for half in range(2)]
    words, thirds = two_bit_words(rows, 2 * ROWS, number), _third_bits(rows, number)
    full = [with_bits(code, *both) for both in zip(words, thirds, strict=True)]
    products = [turned[w // 4].applied(word) for w, word in enumerate(full)]
    return [Block(products, [code.b.fneg(d)])]


def _third_bits(rows: Rows, number: Any) -> list[Callable[[], Any]]:
    """The bits above two: every four blocks of 32 share four planes with two words in each.

    Block i of the four has bit i of every byte (words 0..3) and bit 4 + i (words 4..7).
    """
    code, b, offset = rows.code, rows.code.b, 2 * ROWS + 16 * LINE
    planes = code.at(rows.base, code.times(b.lshr(number, const(2)), 4 * LINE))
    place = b.and_(number, const(3))

    def bits(w: int) -> Callable[[], Any]:
        turn = code.splat(b.trunc(b.sub(const(2 - 4 * (w // 4)), place), I32))

        def emit() -> Any:
            plane = b.bitcast(rows.word(planes, offset, w % 4), turn.type)
            name = f"llvm.fshl.v{code.lanes}i32"
            turned = code.intrinsic(name, turn.type, [plane, plane, turn])
            return b.and_(turned, code.fill(I32, 0x04040404))

        return emit

    return [bits(w) for w in range(8)]


class _Turned:
    """(u - 4) * s + 128 of bytes u in 0..7, for s in -32..32 of each row.

    With a = |s| no product u * a leaves its byte. For s > 0 the code is u * a + 128 - 4 * a, for
    s < 0 it is 255 less u * a + 127 - 4 * a, which turns all bits over.
    """

    def __init__(self, code: Code, packed: Any) -> None:
        """packed: int32 of a signed byte, a in its low six bits."""
        b = self.b = code.b
        size = b.and_(packed, code.fill(I32, 63))
        sign = b.ashr(packed, code.fill(I32, 31))
        shift = b.sub(b.add(sign, code.fill(I32, 128)), b.shl(size, code.fill(I32, 2)))
        self.factor = both_halves(code, size)
        self.shift, self.sign = every_byte(code, shift), b.bitcast(sign, vec(I8, 4 * code.lanes))

    def applied(self, word: Word) -> Word:
        """The codes of a word of three-bit numbers."""
        b = self.b

        def emit() -> Any:
            product = b.mul(b.bitcast(word(), self.factor.type), self.factor)
            shifted = b.add(b.bitcast(product, self.sign.type), self.shift)
            return b.xor(shifted, self.sign)

        return emit


def _tq2_0(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    return [Block(two_bit_words(rows, 2 * ROWS, number), head)]


def _tq1_0(rows: Rows, head: list[Any], base: Any, number: Any) -> list[Block]:
    """Digit j of eight planes is block j; the digits of four planes, then of one, follow."""
    places = [(w, j) for j in range(5) for w in range(8)]
    places += [(8 + w, j) for j in range(5) for w in range(4)]
    places += [(12, j) for j in range(4)]
    words = [_digit(rows, base, plane, j) for plane, j in places]
    return [Block(words[i : i + 8], head) for i in range(0, 64, 8)]


def _digit(rows: Rows, base: Any, plane: int, j: int) -> Word:
    """Base-3 digit j of every byte of a plane: bytes are fractions of 256, first digits first."""
    code, kind = rows.code, vec(I16, 2 * rows.code.lanes)
    b, low = code.b, code.fill(I16, 255, kind.count)

    def digit(fraction: Any) -> Any:
        if j:
            power = code.fill(I16, 3**j, kind.count)
            fraction = b.and_(b.mul(fraction, power), low)
        return b.mul(fraction, code.fill(I16, 3, kind.count))

    def emit() -> Any:
        packed = rows.word(base, 0, plane)
        pairs, eight = b.bitcast(packed, kind), code.fill(I16, 8, kind.count)
        even = b.lshr(digit(b.and_(pairs, low)), eight)
        odd = b.and_(digit(b.lshr(pairs, eight)), code.fill(I16, 0xFF00, kind.count))
        return b.bitcast(b.or_(even, odd), packed.type)

    return emit


STEPS = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_XS": _iq4_xs,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
}
