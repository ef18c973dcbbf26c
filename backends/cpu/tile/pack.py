"""Pack kernels: rows of GGUF blocks become groups of 16 interleaved rows.

Parallel over the groups of all matrices: every thread packs a contiguous range of groups. Within
a group rows are taken one by one, and each row's 4-byte words are scattered to its 32-bit lane of
the word planes. Rows past the end of the matrix are zero, scales included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from runtime.backends.cpu.isa import isa
from runtime.backends.cpu.tile.formats import LINE, ROWS, Format, format_of
from runtime.backends.cpu.tile.vector import I1, I8, I16, I32, Code, const, ir, vec

PACK_ARGS = (
    "src",  # rows of GGUF blocks
    "dst",  # packed groups
    "n_rows",  # of one matrix
    "n_inner",  # elements of a row
    "src_row_bytes",  # between rows
    "n_matrices",  # 1, or the number of experts
    "src_matrix_bytes",  # between matrices
    "dst_matrix_bytes",  # between packed matrices
)


def emit_pack(format_name: str, isa_name: str) -> str:
    """LLVM IR text of the pack kernel of a format; its arguments are `PACK_ARGS`."""
    code, layout = Code(isa(isa_name)), format_of(format_name)
    args = code.arguments(PACK_ARGS)
    n_groups = code.ceil_div(args["n_rows"], ROWS)
    blocks = code.b.udiv(args["n_inner"], const(layout.block))
    first, end = code.my_share(code.times(n_groups, args["n_matrices"]))

    def one(item: Any) -> None:
        matrix, group = code.b.udiv(item, n_groups), code.b.urem(item, n_groups)
        row = code.times(group, ROWS)
        source = code.at(args["src"], code.times(matrix, args["src_matrix_bytes"]))
        source = code.at(source, code.times(row, args["src_row_bytes"]))
        size = code.times(
            _even(code, blocks) if layout.name == "BF16" else blocks, layout.packed_bytes
        )
        goal = code.at(args["dst"], code.times(matrix, args["dst_matrix_bytes"]))
        goal = code.at(goal, code.times(group, size))
        rows = code.smaller(const(ROWS), code.b.sub(args["n_rows"], row))
        _clear(code, layout, goal, size, rows)
        _group(code, layout, _Group(source, args["src_row_bytes"], goal, rows, blocks))

    code.each(first, end, one)
    return code.finish()


@dataclass(frozen=True)
class _Group:
    source: Any
    row_bytes: Any
    goal: Any
    rows: Any
    blocks: Any


def _even(code: Code, n: Any) -> Any:
    return code.times(code.ceil_div(n, 2), 2)


def _clear(code: Code, layout: Format, goal: Any, size: Any, rows: Any) -> None:
    """Zero a group that rows will not fill; for BF16 an odd K leaves halves of pairs too."""
    zero = ir.Constant(vec(I8, 32), [0] * 32)
    unfilled = code.b.icmp_signed("<", rows, const(ROWS))
    if layout.name == "BF16":
        unfilled = ir.Constant(I1, 1)
    with code.b.if_then(unfilled):
        code.each(0, size, lambda i: code.store(zero, code.at(goal, i)), step=32)


def _group(code: Code, layout: Format, group: _Group) -> None:
    """Blocks outside, rows inside: sixteen source rows are read side by side."""
    pack = _STEPS[layout.name]

    def block(i: Any) -> None:
        goal = code.at(group.goal, code.times(i, layout.packed_bytes))
        place = code.at(group.source, code.times(i, layout.source_bytes))

        def row(r: Any) -> None:
            pack(_Row(code, code.at(place, code.times(r, group.row_bytes)), goal, r, i))

        code.each(0, group.rows, row)

    code.each(0, group.blocks, block)


@dataclass(frozen=True)
class _Row:
    """One block of one row: reads the source, writes the row's lane of the planes."""

    code: Code
    source: Any
    goal: Any
    row: Any
    number: Any  # of the block in its row

    def f16(self, offset: int, to: int) -> None:
        """Copy a float16 into a plane of them at byte `to` of the packed block."""
        value = self.code.load(self.code.at(self.source, offset), I16)
        self.code.store(value, self.code.at(self.goal, to, self.code.times(self.row, 2)), 1)

    def words(
        self, offset: int, to: int, count: int, change: Callable[[Any], Any] | None = None
    ) -> None:
        """Copy `count` words of 4 bytes into word planes, each changed by `change`."""
        lane = self.code.at(self.goal, to, self.code.times(self.row, 4))
        for w in range(count):
            address = self.code.pointer(self.code.at(self.source, offset + 4 * w), I32)
            value = self.code.b.load(address)
            value.align = 1
            value = change(value) if change else value
            self.code.store(value, self.code.at(lane, LINE * w), 1)

    def source_byte(self, offset: int) -> Any:
        """The source byte at `offset`."""
        return self.code.load(self.code.at(self.source, offset), I8)

    def byte(self, value: Any, to: int) -> None:
        """Put a byte into a plane of them at byte `to` of the packed block."""
        self.code.store(value, self.code.at(self.goal, to, self.row))

    def fifth_bits(self, offset: int, to: int) -> None:
        """32 bits, element by element, become the plane whose bit w, byte k is element 4w + k."""
        b = self.code.b
        bits = self.code.load(self.code.at(self.source, offset), I32, 2)
        plane = ir.Constant(I32, 0)
        for w in range(8):
            four = b.and_(b.lshr(bits, ir.Constant(I32, 4 * w)), ir.Constant(I32, 15))
            # The product has bit k of the four at 8k, among others that the mask drops.
            spread = b.mul(four, ir.Constant(I32, 0x00204081))
            spread = b.and_(spread, ir.Constant(I32, 0x01010101))
            plane = b.or_(plane, b.shl(spread, ir.Constant(I32, w)))
        self.code.store(plane, self.code.at(self.goal, to, self.code.times(self.row, 4)))


def _f32(row: _Row) -> None:
    row.words(0, 0, 1)


def _f16(row: _Row) -> None:
    row.f16(0, 0)


def _bf16(row: _Row) -> None:
    """Element k is half k % 2 of its row's lane in pair k // 2; `goal` is k * 32."""
    code = row.code
    odd = code.b.and_(row.number, const(1))
    pair = code.b.sub(row.goal, code.times(odd, 2 * ROWS))
    value = code.load(row.source, I16)
    code.store(value, code.at(pair, code.times(row.row, 4), code.times(odd, 2)), 1)


def _q4_0(row: _Row) -> None:
    row.f16(0, 0)
    row.words(2, 2 * ROWS, 4)


def _q8_0(row: _Row) -> None:
    row.f16(0, 0)
    row.words(2, 2 * ROWS, 8, lambda v: row.code.b.xor(v, ir.Constant(I32, 0x80808080)))


def _q4_1(row: _Row) -> None:
    row.f16(0, 0)
    row.f16(2, 2 * ROWS)
    row.words(4, 4 * ROWS, 4)


def _q5_0(row: _Row) -> None:
    row.f16(0, 0)
    row.fifth_bits(2, 2 * ROWS)
    row.words(6, 2 * ROWS + LINE, 4)


def _q5_1(row: _Row) -> None:
    row.f16(0, 0)
    row.f16(2, 2 * ROWS)
    row.fifth_bits(4, 4 * ROWS)
    row.words(8, 4 * ROWS + LINE, 4)


def _q4_k(row: _Row) -> None:
    row.f16(0, 0)
    row.f16(2, 2 * ROWS)
    _k_chunks(row, 4 * ROWS, 16)


def _q5_k(row: _Row) -> None:
    row.f16(0, 0)
    row.f16(2, 2 * ROWS)
    row.words(16, 4 * ROWS, 8)
    _k_chunks(row, 4 * ROWS + 8 * LINE, 48)


def _k_chunks(row: _Row, to: int, nibbles: int) -> None:
    """Four chunks: two scales, two minima, eight planes of nibbles from byte `nibbles` on."""
    for j in range(4):
        start = to + j * (4 * ROWS + 8 * LINE)
        for part in range(2):
            scale, minimum = _six_bits(row, 2 * j + part)
            row.byte(scale, start + part * ROWS)
            row.byte(minimum, start + (2 + part) * ROWS)
        row.words(nibbles + 32 * j, start + 4 * ROWS, 8)


def _six_bits(row: _Row, j: int) -> tuple[Any, Any]:
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


def _q6_k(row: _Row) -> None:
    row.f16(208, 0)
    for half in range(2):
        start = 2 * ROWS + half * (8 * ROWS + 24 * LINE)
        for i in range(8):
            row.byte(row.source_byte(192 + 8 * half + i), start + i * ROWS)
        row.words(64 * half, start + 8 * ROWS, 16)
        row.words(128 + 32 * half, start + 8 * ROWS + 16 * LINE, 8)


_STEPS: dict[str, Callable[[_Row], None]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "IQ4_NL": _q4_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
