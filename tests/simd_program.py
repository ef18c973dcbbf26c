"""Runs every operation of the SIMD layer on given numbers; a program, since Numba has one target.

python simd_program.py ISA INPUT OUTPUT: 48 float32 in INPUT become rows of 16 words in OUTPUT.
"""

from __future__ import annotations

import sys
from types import ModuleType

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

    o = _emitted()

    @helper
    def floats(out, value):
        s.store(out, value)
        return out + 64

    @helper
    def ints(out, value):
        o.store_ints(out, value)
        return out + 64

    def operations(x, out):
        a, b, c = s.load(x), s.load(x + 64), s.load(x + 128)
        i, j = o.as_ints(a), o.nearest_int(c)
        out = floats(out, a + b)
        out = floats(out, a - b)
        out = floats(out, a * b)
        out = floats(out, a / b)
        out = floats(out, -a)
        out = floats(out, s.larger(a, b))
        out = floats(out, s.smaller(a, b))
        out = floats(out, o.absolute(a))
        out = floats(out, o.nearest(c))
        out = floats(out, o.to_float(j))
        out = floats(out, s.select((a < b) | (a >= c), a, c))
        out = floats(out, s.select((a <= b) & (a > c), a, o.as_floats(i ^ j)))
        out = ints(out, j + i)
        out = ints(out, j - i)
        out = ints(out, j * i)
        out = ints(out, s.select_ints(j == s.lane_numbers(), i & j, i | j))
        out = ints(out, o.shift_left(i, 3))
        out = ints(out, o.shift_right(i, 3))
        out = ints(out, s.splat_int(o.total_int(j)))
        out = floats(out, s.splat(s.total(c)))
        out = floats(out, s.splat(s.largest(c)))
        out = floats(out, o.load_half(x))
        out = floats(out, o.load_brain(x))
        out = floats(out, o.load_bytes(x))
        out = ints(out, o.load_ints(x))
        o.store_half(out, c)
        o.store_brain(out + 32, c)
        out += 64
        o.store_bytes(out, j)
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
            s.store_i32(at, o.half_bits(s.load_f32(x + 128 + lane * 4)))
            s.store_f32(at + 64, o.half_of(s.load_u16(x + lane * 2)))
            s.store_f32(at + 128, o.nearest_f32(s.load_f32(x + 128 + lane * 4)))
            s.store_f32(at + 192, s.sqrt_f32(s.f32(o.load_u8(x + lane))))
            s.store_i32(at + 256, o.load_i8(x + lane) + s.load_i32(x + lane * 4))
            s.store_f32(at + 320, s.float_of(o.bits_of(s.load_f32(x + lane * 4))))
            o.store_i8(out + 384 + lane, s.load_i64(x + lane * 8))
            s.store_i16(out + 400 + lane * 2, s.load_i64(x + lane * 8))
            s.store_i64(out + 448 + lane % 8 * 8, s.load_i64(x + lane * 8))
        s.prefetch(x)
        return out + 512

    return operations


def _emitted() -> ModuleType:
    """Operations that no kernel has, of the builders that kernels have parts of, as a module."""
    from runtime.backends.cpu.kernels import emit as e
    from runtime.backends.cpu.kernels import simd as s

    f32, i32, i64, floats, ints = s.f32, s.i32, s.i64, s.f32x16, s.i32x16

    def loads(result, element, convert=lambda b, value: value):
        return s.operation(result, i64)(lambda b, at: convert(b, e.load(b, at, e.wide(element), 1)))

    def stores(given, convert=lambda b, value: value):
        return s.operation(s.void, i64, given)(lambda b, at, v: e.store(b, convert(b, v), at, 1))

    def first(b, value):
        return b.extract_element(value, e.ir.Constant(e.i32, 0))

    def bits_of_half(b, x):
        return b.zext(first(b, e.float_to_half(b, e.splat(b, x), s.HALVES)), e.i64)

    def half(b, x):
        return first(b, e.half_to_float(b, e.splat(b, b.trunc(x, e.i16)), s.HALVES))

    def byte(extend):
        return s.operation(i64, i64)(
            lambda b, at: getattr(b, extend)(e.load(b, at, e.i8, 1), e.i64)
        )

    def by(b, n):
        return e.splat(b, b.trunc(n, e.i32))

    def wide(b, x):
        return b.sitofp(b.sext(x, e.wide(e.i32)), e.wide(e.f32))

    found = ModuleType("emitted")  # Numba looks names up in modules
    found.__dict__.update(
        load_i8=byte("sext"), load_u8=byte("zext"),
        load_ints=loads(ints, e.i32),
        load_half=loads(floats, e.i16, lambda b, v: e.half_to_float(b, v, s.HALVES)),
        load_brain=loads(floats, e.i16, e.brain_to_float), load_bytes=loads(floats, e.i8, wide),
        store_i8=s.operation(s.void, i64, i64)(
            lambda b, at, value: e.store(b, b.trunc(value, e.i8), at, 1)
        ),
        store_ints=stores(ints),
        store_half=stores(floats, lambda b, v: e.float_to_half(b, v, s.HALVES)),
        store_brain=stores(floats, e.float_to_brain),
        store_bytes=stores(ints, lambda b, v: b.trunc(v, e.wide(e.i8))),
        bits_of=s.operation(i64, f32)(lambda b, x: b.zext(b.bitcast(x, e.i32), e.i64)),
        half_of=s.operation(f32, i64)(half), half_bits=s.operation(i64, f32)(bits_of_half),
        nearest_f32=s.operation(f32, f32)(lambda b, x: first(b, e.nearest(b, e.splat(b, x)))),
        absolute=s.operation(floats, floats)(lambda b, x: e.absolute(b, x)),
        nearest=s.operation(floats, floats)(lambda b, x: e.nearest(b, x)),
        nearest_int=s.operation(ints, floats)(lambda b, x: e.nearest_int(b, x)),
        to_float=s.operation(floats, ints)(lambda b, x: b.sitofp(x, e.wide(e.f32))),
        as_ints=s.operation(ints, floats)(lambda b, x: b.bitcast(x, e.wide(e.i32))),
        as_floats=s.operation(floats, ints)(lambda b, x: b.bitcast(x, e.wide(e.f32))),
        total_int=s.operation(i32, ints)(lambda b, x: e.total(b, x)),
        shift_left=s.operation(ints, ints, i64)(lambda b, x, n: b.shl(x, by(b, n))),
        shift_right=s.operation(ints, ints, i64)(lambda b, x, n: b.ashr(x, by(b, n))),
    )  # fmt: skip
    return found


if __name__ == "__main__":
    sys.path[:0] = sys.argv.pop(1).split("\n")
    main(*sys.argv[1:])
