"""Code books as constants of a kernel: tables of words, four codes each, read by index."""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.backends.cpu.tile.vector import I1, I8, I32, Code, ir, undefined, vec
from runtime.ops.blocks import BLOCK_FORMATS
from runtime.ops.codebooks import code_book

_SIGN, _EIGHTHS = 128, 16  # what is added to a level, and to eight times a level of IQ1


def words_of(name: str) -> np.ndarray[Any, Any]:
    """The book of a format as codes, four in a word: uint32 [entries, 1 or 2].

    IQ1 has levels -1, 0 and 1 and adds an eighth to all or takes it from all: codes are eight
    times the level + 16. The others have magnitudes: codes are those of positive signs, + 128.
    """
    levels = code_book(BLOCK_FORMATS[name.lower()].book)
    codes = 8 * levels + _EIGHTHS if name.startswith("IQ1") else levels + _SIGN
    return np.ascontiguousarray(codes.astype(np.uint8)).view("<u4")


def book(code: Code, name: str) -> Any:
    """Pointer to the book of a format, a constant of the module."""
    found = code.module.globals.get("book")
    if found is None:
        words = words_of(name).reshape(-1)
        kind = ir.ArrayType(I32, len(words))
        found = ir.GlobalVariable(code.module, kind, "book")
        found.initializer = ir.Constant(kind, [int(w) for w in words])
        found.global_constant, found.linkage, found.align = True, "internal", 64
    return code.b.bitcast(found, I8.as_pointer())


def picked(code: Code, table: Any, indices: Any, scale: int, offset: int) -> Any:
    """The word at table + scale * index + offset of every lane, as bytes."""
    b, lanes = code.b, code.lanes
    table = b.gep(table, [ir.Constant(I32, offset)]) if offset else table
    if lanes == 16:
        words = _gathered(code, table, indices, scale)
    else:
        words = undefined(vec(I32, lanes))
        for i in range(lanes):
            lane = ir.Constant(I32, i)
            at = b.mul(b.extract_element(indices, lane), ir.Constant(I32, scale))
            place = b.bitcast(b.gep(table, [at]), I32.as_pointer())
            value = b.load(place)
            value.align = 4
            words = b.insert_element(words, value, lane)
    return b.bitcast(words, vec(I8, 4 * lanes))


def _gathered(code: Code, table: Any, indices: Any, scale: int) -> Any:
    """AVX-512's gather."""
    every = ir.Constant(vec(I1, 16), [1] * 16)
    args = [code.fill(I32, 0), table, indices, every, ir.Constant(I32, scale)]
    return code.intrinsic("llvm.x86.avx512.mask.gather.dpi.512", indices.type, args)
