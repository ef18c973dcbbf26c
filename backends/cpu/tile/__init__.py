"""Kernels that read weights: layouts, packing, matmul tiles, and rows of the file's blocks.

`emit_matmul(TileSpec(...), isa)`, `emit_pack(format, isa)` and `emit_get_rows(type, isa)` give LLVM
IR; the modules that need llvmlite are imported only when something is emitted.
"""

from __future__ import annotations

from runtime.backends.cpu.tile.formats import NAMES as FORMATS
from runtime.backends.cpu.tile.formats import packed_nbytes
from runtime.backends.cpu.tile.spec import TileSpec, activation_tile_nbytes

__all__ = [
    "FORMATS",
    "TileSpec",
    "activation_tile_nbytes",
    "emit_get_rows",
    "emit_matmul",
    "emit_pack",
    "packed_nbytes",
]


def emit_matmul(spec: TileSpec, isa_name: str) -> str:
    """LLVM IR text of the matmul kernel `spec`, see `runtime.backends.cpu.tile.emit`."""
    from runtime.backends.cpu.tile.emit import emit_matmul as emit

    return emit(spec, isa_name)


def emit_pack(format_name: str, isa_name: str) -> str:
    """LLVM IR text of the kernel that packs weights, see `runtime.backends.cpu.tile.pack`."""
    from runtime.backends.cpu.tile.pack import emit_pack as emit

    return emit(format_name, isa_name)


def emit_get_rows(name: str, isa_name: str) -> str:
    """LLVM IR text of the kernel that reads embedding rows, see `tile.get_rows`."""
    from runtime.backends.cpu.tile.get_rows import emit_get_rows as emit

    return emit(name, isa_name)
