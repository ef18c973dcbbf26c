"""Pack steps of the formats with blocks of 256."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runtime.backends.cpu.tile.formats import LINE, ROWS
from runtime.backends.cpu.tile.pack_row import Row
from runtime.backends.cpu.tile.vector import I8, ir


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


STEPS: dict[str, Callable[[Row], None]] = {
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
