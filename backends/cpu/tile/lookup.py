"""Sixteen-entry tables: four-bit indices become byte codes by one shuffle where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runtime.backends.cpu.compile.isa import host_arch
from runtime.backends.cpu.tile.vector import I8, Code, ir, vec

_SHUFFLES = {  # bytes of a vector -> instruction that looks up each 16 bytes in a table of 16
    64: "llvm.x86.avx512.pshuf.b.512",
    32: "llvm.x86.avx2.pshuf.b",
    16: "llvm.x86.ssse3.pshuf.b.128",  # not in SSE2, of which a vector has four lanes
}


def lookup(code: Code, indices: Any, table: Sequence[int]) -> Any:
    """table[i] for each byte i (0..15) of the vector `indices`."""
    n = indices.type.count
    values = ir.Constant(vec(I8, n), (list(table) * n)[:16] * (n // 16))
    if n in _SHUFFLES and (n > 16 or code.lanes > 4):
        return code.intrinsic(_SHUFFLES[n], indices.type, [values, indices])
    if (code.isa.arch or host_arch()) == "aarch64":
        return code.intrinsic("llvm.aarch64.neon.tbl1.v16i8", indices.type, [values, indices])
    return _selected(code, indices, table)


def _selected(code: Code, indices: Any, table: Sequence[int]) -> Any:
    """A tree of selects on the four bits of the index: SSE2 has no byte shuffle."""
    b, n = code.b, indices.type.count
    level = [code.fill(I8, v, n) for v in table]
    for bit in range((len(table) - 1).bit_length()):
        mask = code.fill(I8, 1 << bit, n)
        chosen = b.icmp_unsigned("==", b.and_(indices, mask), mask)
        level = [b.select(chosen, level[i + 1], level[i]) for i in range(0, len(level), 2)]
    return level[0]
