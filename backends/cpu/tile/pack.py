"""Pack kernels: rows of GGUF blocks become groups of 16 interleaved rows.

Parallel over the groups of all matrices: every thread packs a contiguous range of groups. Within
a group rows are taken one by one, and each row's 4-byte words are scattered to its 32-bit lane of
the word planes. Rows past the end of the matrix are zero, scales included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runtime.backends.cpu.compile.isa import isa
from runtime.backends.cpu.tile.formats import ROWS, Format, format_of
from runtime.backends.cpu.tile.pack_row import Row
from runtime.backends.cpu.tile.source import Source
from runtime.backends.cpu.tile.spec import PACK_ARGS
from runtime.backends.cpu.tile.vector import I1, I8, Code, const, ir, vec
from runtime.ops.blocks import BLOCK_FORMATS


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
    zero = ir.Constant(vec(I8, ROWS), [0] * ROWS)
    unfilled = code.b.icmp_signed("<", rows, const(ROWS))
    if layout.name == "BF16":
        unfilled = ir.Constant(I1, 1)
    with code.b.if_then(unfilled):
        code.each(0, size, lambda i: code.store(zero, code.at(goal, i)), step=ROWS)


def _group(code: Code, layout: Format, group: _Group) -> None:
    """Blocks outside, rows inside: sixteen source rows are read side by side."""

    def block(i: Any) -> None:
        goal = code.at(group.goal, code.times(i, layout.packed_bytes))
        place = code.at(group.source, code.times(i, layout.source_bytes))

        def row(r: Any) -> None:
            source = code.at(place, code.times(r, group.row_bytes))
            if layout.is_float:
                _value(code, layout, source, goal, r, i)
            else:
                Row(Source(code, BLOCK_FORMATS[layout.name.lower()], source), goal, r).pack(layout)

        code.each(0, group.rows, row)

    code.each(0, group.blocks, block)


def _value(code: Code, layout: Format, source: Any, goal: Any, row: Any, k: Any) -> None:
    """Element k of a row of plain numbers.

    Of BF16 it is half k % 2 of its row's lane in pair k // 2; `goal` is k * 32.
    """
    value = code.load(source, ir.IntType(8 * layout.source_bytes))
    if layout.name == "BF16":
        odd = code.b.and_(k, const(1))
        goal = code.at(code.b.sub(goal, code.times(odd, 2 * ROWS)), code.times(odd, 2))
        code.store(value, code.at(goal, code.times(row, 4)))
    else:
        code.store(value, code.at(goal, code.times(row, layout.source_bytes)))
