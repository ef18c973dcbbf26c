"""Pack steps of the formats with blocks of 256."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runtime.backends.cpu.tile.formats import LINE, ROWS
from runtime.backends.cpu.tile.pack_row import Row
from runtime.backends.cpu.tile.vector import I8, I32, ir


def _q4_k(row: Row) -> None:
    row.f16(0, 0)
    row.f16(2, 2 * ROWS)
    _k_chunks(row, 4 * ROWS, 16)


def _q5_k(row: Row) -> None:
    row.f16(0, 0)
    row.f16(2, 2 * ROWS)
    row.words(16, 4 * ROWS, 8)
    _k_chunks(row, 4 * ROWS + 8 * LINE, 48)


def _k_chunks(row: Row, to: int, nibbles: int) -> None:
    """Four chunks: two scales, two minima, eight planes of nibbles from byte `nibbles` on."""
    for j in range(4):
        start = to + j * (4 * ROWS + 8 * LINE)
        for part in range(2):
            scale, minimum = _six_bits(row, 2 * j + part)
            row.byte(scale, start + part * ROWS)
            row.byte(minimum, start + (2 + part) * ROWS)
        row.words(nibbles + 32 * j, start + 4 * ROWS, 8)


def _six_bits(row: Row, j: int) -> tuple[Any, Any]:
    """Scale and minimum j of the 12 bytes at byte 4 of a K block, where 16 numbers of 6 bits are.

    Numbers 0..3 are bytes' low six bits; of 4..7 four bits are in the last four bytes and two in
    the top bits of the first eight (get_scale_min_k4 of the GGUF reference).
    """
    b, at = row.code.b, 4
    if j < 4:
        return tuple(b.and_(row.source_byte(at + j + k), ir.Constant(I8, 63)) for k in (0, 4))
    both = row.source_byte(at + j + 4)
    lows = b.and_(both, ir.Constant(I8, 15)), b.lshr(both, ir.Constant(I8, 4))
    tops = row.source_byte(at + j - 4), row.source_byte(at + j)
    return tuple(
        b.or_(low, b.and_(b.lshr(top, ir.Constant(I8, 2)), ir.Constant(I8, 48)))
        for low, top in zip(lows, tops, strict=True)
    )


def _q6_k(row: Row) -> None:
    row.f16(208, 0)
    for half in range(2):
        start = 2 * ROWS + half * (8 * ROWS + 24 * LINE)
        for i in range(8):
            row.byte(row.source_byte(192 + 8 * half + i), start + i * ROWS)
        row.words(64 * half, start + 8 * ROWS, 16)
        row.words(128 + 32 * half, start + 8 * ROWS + 16 * LINE, 8)


def _iq4_xs(row: Row) -> None:
    """Scales of six bits: four in nibbles from byte 4 on, two in the 16 bits at byte 2; less 32."""
    b = row.code.b
    row.f16(0, 0)
    for i in range(8):
        start = 2 * ROWS + i // 2 * (2 * ROWS + 8 * LINE)
        low = _field(row, 4 + i // 2, 4 * (i % 2), 15)
        high = _field(row, 2 + i // 4, 2 * (i % 4), 3)
        scale = b.or_(low, b.shl(high, ir.Constant(I8, 4)))
        row.byte(b.sub(scale, ir.Constant(I8, 32)), start + i % 2 * ROWS)
        row.words(8 + 16 * i, start + 2 * ROWS + i % 2 * 4 * LINE, 4)


def _field(row: Row, offset: int, shift: int, mask: int) -> Any:
    """Bits of the source byte at `offset`."""
    b = row.code.b
    return b.and_(b.lshr(row.source_byte(offset), ir.Constant(I8, shift)), ir.Constant(I8, mask))


def _q2_k(row: Row) -> None:
    row.f16(80, 0)
    row.f16(82, 2 * ROWS)
    row.words(16, 4 * ROWS, 16)
    for i in range(16):
        row.byte(row.source_byte(i), 4 * ROWS + 16 * LINE + i * ROWS)


def _q3_k(row: Row) -> None:
    row.f16(108, 0)
    row.words(32, 2 * ROWS, 16)
    for half in range(2):
        _third_bits(row, half, 2 * ROWS + (16 + 4 * half) * LINE)
    for i in range(16):
        row.byte(_turned_scale(row, i), 2 * ROWS + 24 * LINE + i * ROWS)


def _turned_scale(row: Row, i: int) -> Any:
    """s = 32 - scale i as a byte: |s|, and the top bit where s is negative.

    Scales have six bits: four in the nibbles of bytes 96..103, two in bytes 104..107.
    """
    b = row.code.b
    low = _field(row, 96 + i % 8, 4 * (i // 8), 15)
    high = _field(row, 104 + i % 4, 2 * (i // 4), 3)
    s = b.sub(ir.Constant(I8, 32), b.or_(low, b.shl(high, ir.Constant(I8, 4))))
    negative = b.icmp_signed("<", s, ir.Constant(I8, 0))
    return b.select(negative, b.or_(b.neg(s), ir.Constant(I8, -128)), s)


def _third_bits(row: Row, half: int, to: int) -> None:
    """Eight source words of bits, four of them for this half: two words become one."""
    b = row.code.b
    mask = ir.Constant(I32, 0x0F0F0F0F)
    lane = row.code.at(row.goal, to, row.code.times(row.row, 4))
    for w in range(4):
        low, high = (
            b.and_(b.lshr(row.source_word(4 * (w + k)), ir.Constant(I32, 4 * half)), mask)
            for k in (0, 4)
        )
        both = b.or_(low, b.shl(high, ir.Constant(I32, 4)))
        row.code.store(both, row.code.at(lane, LINE * w), 1)


def _tq2_0(row: Row) -> None:
    row.f16(64, 0)
    row.words(0, 2 * ROWS, 16)


def _tq1_0(row: Row) -> None:
    row.f16(52, 0)
    row.words(0, 2 * ROWS, 13)


STEPS: dict[str, Callable[[Row], None]] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_XS": _iq4_xs,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
}
