"""Sixteen-entry tables: four-bit indices become byte codes by one shuffle where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runtime.backends.cpu.compile.isa import host_arch
from runtime.backends.cpu.tile.vector import I8, Code, ir, undefined, vec

_SHUFFLES = {  # bytes of a vector -> instruction that looks up each 16 bytes in a table of 16
    64: "llvm.x86.avx512.pshuf.b.512",
    32: "llvm.x86.avx2.pshuf.b",
    16: "llvm.x86.ssse3.pshuf.b.128",  # not in SSE2, of which a vector has four lanes
}


def lookup(code: Code, indices: Any, table: Sequence[int]) -> Any:
    """table[i] for each byte i (0..15) of the vector `indices`."""
    n, on_arm = indices.type.count, (code.isa.arch or host_arch()) == "aarch64"
    if not on_arm and code.isa.lanes == 4:
        return _selected(code, indices, table)
    if n < 16:  # what a shuffle takes at least
        wide = code.shuffle(indices, undefined(indices.type), [i % n for i in range(16)])
        return code.shuffle(lookup(code, wide, table), undefined(wide.type), range(n))
    values = ir.Constant(vec(I8, n), (list(table) * n)[:16] * (n // 16))
    if not on_arm:
        return code.intrinsic(_SHUFFLES[n], indices.type, [values, indices])
    return code.intrinsic("llvm.aarch64.neon.tbl1.v16i8", indices.type, [values, indices])


def _selected(code: Code, indices: Any, table: Sequence[int]) -> Any:
    """A tree of selects on the four bits of the index: SSE2 has no byte shuffle."""
    b, n = code.b, indices.type.count
    level = [code.fill(I8, v, n) for v in table]
    for bit in range((len(table) - 1).bit_length()):
        mask = code.fill(I8, 1 << bit, n)
        chosen = b.icmp_unsigned("==", b.and_(indices, mask), mask)
        level = [b.select(chosen, level[i + 1], level[i]) for i in range(0, len(level), 2)]
    return level[0]
