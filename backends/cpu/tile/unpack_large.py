"""Unpack steps of the formats with blocks of 256, whose scales are themselves quantised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runtime.backends.cpu.tile.codes import Block, Rows, Word, moved, nibbles, with_bits
from runtime.backends.cpu.tile.formats import LINE, ROWS
from runtime.backends.cpu.tile.vector import F32, I8, I32, const


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


# Where the float16 values of a block's header are.
HEADERS = {"Q4_K": (0, 2 * ROWS), "Q5_K": (0, 2 * ROWS), "Q6_K": (0,)}
STEPS = {
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
