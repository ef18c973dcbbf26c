"""Pack steps of plain numbers and of the formats whose blocks are short."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runtime.backends.cpu.tile.formats import LINE, ROWS
from runtime.backends.cpu.tile.pack_row import Row
from runtime.backends.cpu.tile.vector import I8, I16, I32, const, ir


def _f32(row: Row) -> None:
    row.words(0, 0, 1)


def _f16(row: Row) -> None:
    row.f16(0, 0)


def _bf16(row: Row) -> None:
    """Element k is half k % 2 of its row's lane in pair k // 2; `goal` is k * 32."""
    code = row.code
    odd = code.b.and_(row.number, const(1))
    pair = code.b.sub(row.goal, code.times(odd, 2 * ROWS))
    value = code.load(row.source, I16)
    code.store(value, code.at(pair, code.times(row.row, 4), code.times(odd, 2)), 1)


def _q4_0(row: Row) -> None:
    row.f16(0, 0)
    row.words(2, 2 * ROWS, 4)


def _q8_0(row: Row) -> None:
    row.f16(0, 0)
    row.words(2, 2 * ROWS, 8, lambda v: row.code.b.xor(v, ir.Constant(I32, 0x80808080)))


def _q4_1(row: Row) -> None:
    row.f16(0, 0)
    row.f16(2, 2 * ROWS)
    row.words(4, 4 * ROWS, 4)


def _q5_0(row: Row) -> None:
    row.f16(0, 0)
    row.fifth_bits(2, 2 * ROWS)
    row.words(6, 2 * ROWS + LINE, 4)


def _q5_1(row: Row) -> None:
    row.f16(0, 0)
    row.f16(2, 2 * ROWS)
    row.fifth_bits(4, 4 * ROWS)
    row.words(8, 4 * ROWS + LINE, 4)


def _q1_0(row: Row) -> None:
    """A plane for each 32 elements, whose bit w is that of word w."""
    row.f16(0, 0)
    for i in range(4):
        row.fifth_bits(2 + 4 * i, 2 * ROWS + LINE * i)


def _q2_0(row: Row) -> None:
    """A plane for each 16 elements, whose bits 2w and 2w + 1 are those of word w.

    The file has four neighbours in a byte: a 4 x 4 matrix of two bits is transposed.
    """
    b = row.code.b

    def swapped(value: Any, distance: int, mask: int) -> Any:
        """The bits of a mask and those `distance` above change places."""
        change = b.xor(value, b.lshr(value, ir.Constant(I32, distance)))
        change = b.and_(change, ir.Constant(I32, mask))
        return b.xor(value, b.or_(change, b.shl(change, ir.Constant(I32, distance))))

    row.f16(0, 0)
    row.words(2, 2 * ROWS, 4, lambda v: swapped(swapped(v, 12, 0x0000F0F0), 6, 0x00CC00CC))


def _mxfp4(row: Row) -> None:
    row.byte(row.source_byte(0), 0)
    row.words(1, ROWS, 4)


def _nvfp4(row: Row) -> None:
    """Scales lose their unused top bit; 0x7f is no number and stands for zero."""
    b = row.code.b
    for i in range(4):
        bits = row.source_byte(i)
        usable = b.icmp_unsigned("!=", bits, ir.Constant(I8, 0x7F))
        bits = b.select(usable, b.and_(bits, ir.Constant(I8, 0x7F)), ir.Constant(I8, 0))
        row.byte(bits, i * ROWS)
    row.words(4, 4 * ROWS, 8)


STEPS: dict[str, Callable[[Row], None]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "IQ4_NL": _q4_0,
    "Q1_0": _q1_0,
    "Q2_0": _q2_0,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
}
