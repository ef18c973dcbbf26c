"""Runs every operation of the SIMD layer on given numbers; a program, since Numba has one target.

python simd_program.py ISA INPUT OUTPUT: 48 float32 in INPUT become rows of 16 words in OUTPUT.
"""

from __future__ import annotations

import sys

import numpy as np


def main(isa: str, source: str, result: str) -> None:
    """Compile for `isa`, run, and write uint32 [rows, 16]."""
    from runtime.backends.cpu.kernels import target

    target.choose(isa)
    from numba import cfunc, types

    kernel = cfunc(types.int64(types.int64, types.int64), error_model="numpy")(_operations())
    given = np.fromfile(source, np.float32)
    out = np.zeros((200, 16), np.uint32)
    end = kernel.ctypes(given.ctypes.data, out.ctypes.data)
    out[: (end - out.ctypes.data) // 64].tofile(result)


def _operations():
    from runtime.backends.cpu.kernels import simd as s
    from runtime.backends.cpu.kernels.rows import helper

    @helper
    def floats(out, value):
        s.store(out, value)
        return out + 64

    @helper
    def ints(out, value):
        s.store_ints(out, value)
        return out + 64

    def operations(x, out):
        a, b, c = s.load(x), s.load(x + 64), s.load(x + 128)
        i, j = s.as_ints(a), s.nearest_int(c)
        out = floats(out, a + b)
        out = floats(out, a - b)
        out = floats(out, a * b)
        out = floats(out, a / b)
        out = floats(out, -a)
        out = floats(out, s.larger(a, b))
        out = floats(out, s.smaller(a, b))
        out = floats(out, s.absolute(a))
        out = floats(out, s.nearest(c))
        out = floats(out, s.to_float(j))
        out = floats(out, s.select((a < b) | (a >= c), a, c))
        out = floats(out, s.select((a <= b) & (a > c), a, s.as_floats(i ^ j)))
        out = ints(out, j + i)
        out = ints(out, j - i)
        out = ints(out, j * i)
        out = ints(out, s.select_ints(j == s.lane_numbers(), i & j, i | j))
        out = ints(out, s.shift_left(i, 3))
        out = ints(out, s.shift_right(i, 3))
        out = ints(out, s.splat_int(s.total_int(j)))
        out = floats(out, s.splat(s.total(c)))
        out = floats(out, s.splat(s.largest(c)))
        out = floats(out, s.load_half(x))
        out = floats(out, s.load_brain(x))
        out = floats(out, s.load_bytes(x))
        out = ints(out, s.load_ints(x))
        s.store_half(out, c)
        s.store_brain(out + 32, c)
        out += 64
        s.store_bytes(out, j)
        out += 64
        s.scatter(out, c, 4, 16)
        out += 64
        s.scatter(out, c, 4, 7)
        out += 64
        for n in range(16):
            s.store_part(out, s.load_part(x, n, s.f32(2)), n + 1 if n < 15 else 15)
            out += 64
        for lane in range(16):
            at = out + lane * 4
            s.store_i32(at, s.half_bits(s.load_f32(x + 128 + lane * 4)))
            s.store_f32(at + 64, s.half_of(s.load_u16(x + lane * 2)))
            s.store_f32(at + 128, s.nearest_f32(s.load_f32(x + 128 + lane * 4)))
            s.store_f32(at + 192, s.sqrt_f32(s.f32(s.load_u8(x + lane))))
            s.store_i32(at + 256, s.load_i8(x + lane) + s.load_i32(x + lane * 4))
            s.store_f32(at + 320, s.float_of(s.bits_of(s.load_f32(x + lane * 4))))
            s.store_i8(out + 384 + lane, s.load_i64(x + lane * 8))
            s.store_i16(out + 400 + lane * 2, s.load_i64(x + lane * 8))
            s.store_i64(out + 448 + lane % 8 * 8, s.load_i64(x + lane * 8))
        s.prefetch(x)
        return out + 512

    return operations


if __name__ == "__main__":
    sys.path[:0] = sys.argv.pop(1).split("\n")
    main(*sys.argv[1:])
