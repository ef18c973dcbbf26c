"""AMX tile registers: their shapes, and the instructions on them.

Tiles are state of the processor, not values: LLVM keeps these calls in the order they are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from runtime.backends.cpu.tile.vector import I8, I16, Code, const, ir, vec


def configure(code: Code, shapes: Mapping[Sequence[int], tuple[int, int]]) -> None:
    """Give tile registers their shapes, {registers: (rows, bytes of a row)}, and zero them all."""
    place = code.stack(64)
    code.store(ir.Constant(vec(I8, 64), [0] * 64), place, 1)
    code.store(ir.Constant(I8, 1), place)  # palette 1: eight tiles of 16 rows of 64 bytes
    for tiles, (rows, row_bytes) in shapes.items():
        for tile in tiles:
            code.store(ir.Constant(I16, row_bytes), code.at(place, 16 + 2 * tile), 2)
            code.store(ir.Constant(I8, rows), code.at(place, 48 + tile))
    _call(code, "ldtilecfg", code.pointer(place, I8))


def release(code: Code) -> None:
    """Give the tile registers back, so that the system need not save them."""
    _call(code, "tilerelease")


def zero(code: Code, tile: int) -> None:
    """tile = 0."""
    _call(code, "tilezero", _number(tile))


def load(code: Code, tile: int, address: Any, stride: int) -> None:
    """Rows of `tile` from memory, `stride` bytes apart."""
    _call(code, "tileloadd64", _number(tile), code.pointer(address, I8), const(stride))


def store(code: Code, tile: int, address: Any, stride: int) -> None:
    """Rows of `tile` to memory, `stride` bytes apart."""
    _call(code, "tilestored64", _number(tile), code.pointer(address, I8), const(stride))


def multiply(code: Code, name: str, total: int, x: int, w: int) -> None:
    """total += x times w by the instruction `name`: tdpbssd (int8) or tdpbf16ps (bfloat16)."""
    _call(code, name, *(_number(tile) for tile in (total, x, w)))


def _number(tile: int) -> ir.Constant:
    return ir.Constant(I8, tile)


def _call(code: Code, name: str, *args: Any) -> None:
    code.intrinsic(f"llvm.x86.{name}", ir.VoidType(), args)
