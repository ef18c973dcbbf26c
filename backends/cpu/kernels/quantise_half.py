"""Rows of float32 to 16-bit floats, to the nearest even. Parallel over pieces of 16 elements."""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

from . import emit as e
from . import simd as s
from .rows import share


def _kernel(convert):
    @s.operation(s.void, s.i64, s.f32x16, s.i64)
    def put(b, address, value, n):
        room = cgutils.alloca_once(b, e.wide(e.i16))
        b.store(convert(b, value), room)
        to = e.pointer(b, address, e.i8)
        cgutils.raw_memcpy(b, to, b.bitcast(room, to.type), b.mul(n, ir.Constant(e.i64, 2)), 1)

    def quantise(x, importance, out, n_rows, n_columns, thread, n_threads):
        n = n_rows * n_columns
        first, last = share((n + 15) // 16, thread, n_threads)
        for i in range(first, min(last, n // 16)):
            put(out + 32 * i, s.load(x + 64 * i), 16)
        rest = n % 16
        if rest != 0 and last > n // 16:
            put(out + 2 * (n - rest), s.load_part(x + 4 * (n - rest), rest, s.f32(0)), rest)

    return quantise


def build_quantise_f16():
    """float16."""
    return _kernel(lambda b, x: e.float_to_half(b, x, s.HALVES))


def build_quantise_bf16():
    """bfloat16."""
    return _kernel(e.float_to_brain)
