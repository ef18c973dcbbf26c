"""The SIMD layer that kernels are written in: vectors of 16 lanes as Numba values.

`f32x16`, `i32x16` and `m16` (comparison results) take the operators + - * / < <= > >= == & | ^ and
the functions below. Addresses are int64, offsets are in bytes. `FUSED` and `HALVES` say what the
instruction set this process compiles for can do; kernels never ask, the operations do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from . import emit as e
from .target import chosen
from .vectors import Vector, f32x16, i32x16, m16, operation

f32, i32, i64 = types.float32, types.int32, types.int64
void = types.void
FUSED, HALVES = chosen().has_fma, chosen().has_f16


# --- scalars at addresses


def _scalar_load(result: types.Type, ty: ir.Type, extend: str = "") -> Any:
    def emit(b, address):
        value = e.load(b, address, ty, 1)
        return getattr(b, extend)(value, e.i64) if extend else value

    return operation(result, i64)(emit)


load_f32 = _scalar_load(f32, e.f32)
load_f64 = _scalar_load(types.float64, e.f64)
load_i8 = _scalar_load(i64, e.i8, "sext")
load_u8 = _scalar_load(i64, e.i8, "zext")
load_u16 = _scalar_load(i64, e.i16, "zext")
load_i32 = _scalar_load(i64, e.i32, "sext")
load_i64 = _scalar_load(i64, e.i64)


@operation(void, i64, f32)
def store_f32(b, address, value):
    """4 bytes, at any address that is a multiple of 4."""
    e.store(b, value, address, 4)


@operation(void, i64, i64)
def store_i32(b, address, value):
    """The low 4 bytes, at an address that is a multiple of 4."""
    e.store(b, b.trunc(value, e.i32), address, 4)


@operation(void, i64, i64)
def store_i8(b, address, value):
    """The low byte."""
    e.store(b, b.trunc(value, e.i8), address, 1)


@operation(void, i64, i64)
def store_i64(b, address, value):
    """8 bytes, at an address that is a multiple of 8."""
    e.store(b, value, address, 8)


@operation(void, i64, i64)
def store_i16(b, address, value):
    """The low 2 bytes, at an address that is a multiple of 2."""
    e.store(b, b.trunc(value, e.i16), address, 2)


@operation(f32, i64)
def float_of(b, bits):
    """The float32 whose bit pattern is the low 32 bits of an argument."""
    return b.bitcast(b.trunc(bits, e.i32), e.f32)


@operation(i64, f32)
def bits_of(b, value):
    """The bit pattern of a float32, unsigned."""
    return b.zext(b.bitcast(value, e.i32), e.i64)


def _one_lane(emit: Callable) -> Callable:
    """Apply a 16-lane emitter to a scalar, so that scalar and vector code agree in every bit."""

    def scalar(b, value):
        return b.extract_element(emit(b, e.splat(b, value)), ir.Constant(e.i32, 0))

    return scalar


@operation(f32, i64)
def half_of(b, bits):
    """f16 bit pattern to f32."""
    wide = e.splat(b, b.trunc(bits, e.i16))
    return b.extract_element(e.half_to_float(b, wide, HALVES), ir.Constant(e.i32, 0))


@operation(i64, f32)
def half_bits(b, value):
    """f32 to f16 bit pattern, to nearest even."""
    wide = e.float_to_half(b, e.splat(b, value), HALVES)
    return b.zext(b.extract_element(wide, ir.Constant(e.i32, 0)), e.i64)


@operation(f32, f32)
def exp_f32(b, value):
    """e^x of a scalar, with the bits of `exp`."""
    return _one_lane(lambda b, x: e.exp(b, x, FUSED))(b, value)


@operation(f32, f32)
def sqrt_f32(b, value):
    """Correctly rounded square root: one instruction on every target."""
    return e.intrinsic_call(b, "llvm.sqrt.f32", e.f32, [value])


@operation(f32, f32)
def nearest_f32(b, value):
    """Round half to even; |value| < 2^22."""
    return _one_lane(e.nearest)(b, value)


# --- vectors at addresses


def _vector_load(result: Vector, element: ir.Type, convert: Callable | None = None) -> Any:
    def emit(b, address):
        value = e.load(b, address, e.wide(element), 1)
        return convert(b, value) if convert else value

    return operation(result, i64)(emit)


def _vector_store(given: Vector, convert: Callable | None = None) -> Any:
    def emit(b, address, value):
        e.store(b, convert(b, value) if convert else value, address, 1)

    return operation(void, i64, given)(emit)


def _int_to_float(b, value):
    return b.sitofp(b.sext(value, e.wide(e.i32)), e.wide(e.f32))


load = _vector_load(f32x16, e.f32)
load_ints = _vector_load(i32x16, e.i32)
load_half = _vector_load(f32x16, e.i16, lambda b, v: e.half_to_float(b, v, HALVES))
load_brain = _vector_load(f32x16, e.i16, e.brain_to_float)
load_bytes = _vector_load(f32x16, e.i8, _int_to_float)
store = _vector_store(f32x16)
store_ints = _vector_store(i32x16)
store_half = _vector_store(f32x16, lambda b, v: e.float_to_half(b, v, HALVES))
store_brain = _vector_store(f32x16, e.float_to_brain)
store_bytes = _vector_store(i32x16, lambda b, v: b.trunc(v, e.wide(e.i8)))


def _each_of(b: ir.IRBuilder, n: Any, body: Callable) -> None:
    with cgutils.for_range(b, n) as loop:
        body(loop.index)


@operation(f32x16, i64, i64, f32)
def load_part(b, address, n, fill):
    """The first n < 16 floats, `fill` in the other lanes; reads nothing beyond them."""
    return e.load_first(b, address, n, fill)


@operation(void, i64, f32x16, i64)
def store_part(b, address, value, n):
    """Store the first n < 16 lanes and touch nothing beyond them."""
    e.store_first(b, value, address, n)


@operation(void, i64, f32x16, i64, i64)
def scatter(b, address, value, stride, n):
    """Store the first n lanes (all 16 where n is larger) `stride` bytes apart."""
    room = cgutils.alloca_once(b, value.type)
    with b.if_else(b.icmp_signed(">=", n, ir.Constant(e.i64, e.LANES))) as (whole, part):
        with whole:
            for lane in range(e.LANES):
                one = b.extract_element(value, ir.Constant(e.i32, lane))
                e.store(b, one, b.add(address, b.mul(stride, ir.Constant(e.i64, lane))), 4)
        with part:
            b.store(value, room)
            lanes = b.bitcast(room, e.f32.as_pointer())

            def copy(i):
                e.store(b, b.load(b.gep(lanes, [i])), b.add(address, b.mul(stride, i)), 4)

            _each_of(b, n, copy)


@operation(void, i64)
def prefetch(b, address):
    """Ask for the cache line at an address, to be read soon; any address is allowed."""
    e.prefetch(b, address)


# --- arithmetic


@operation(f32x16, f32)
def splat(b, value):
    """All 16 lanes equal to a float."""
    return e.splat(b, value)


@operation(i32x16, i64)
def splat_int(b, value):
    """All 16 lanes equal to the low 32 bits of an integer."""
    return e.splat(b, b.trunc(value, e.i32))


@operation(f32x16, f32x16, f32x16, f32x16)
def fma(b, x, y, z):
    """x * y + z, fused where the instruction set can."""
    return e.fma(b, x, y, z, FUSED)


@operation(f32, f32, f32, f32)
def fma_f32(b, x, y, z):
    """x * y + z of scalars, with the bits of `fma`."""
    return e.fma(b, x, y, z, FUSED)


@operation(f32x16, m16, f32x16, f32x16)
def select(b, mask, x, y):
    """x where the mask is set, else y."""
    return b.select(mask, x, y)


@operation(i32x16, m16, i32x16, i32x16)
def select_ints(b, mask, x, y):
    """x where the mask is set, else y."""
    return b.select(mask, x, y)


larger = operation(f32x16, f32x16, f32x16)(lambda b, x, y: e.larger(b, x, y))
smaller = operation(f32x16, f32x16, f32x16)(lambda b, x, y: e.smaller(b, x, y))
absolute = operation(f32x16, f32x16)(lambda b, x: e.absolute(b, x))
nearest = operation(f32x16, f32x16)(lambda b, x: e.nearest(b, x))
nearest_int = operation(i32x16, f32x16)(lambda b, x: e.nearest_int(b, x))
to_float = operation(f32x16, i32x16)(lambda b, x: b.sitofp(x, e.wide(e.f32)))
as_ints = operation(i32x16, f32x16)(lambda b, x: b.bitcast(x, e.wide(e.i32)))
as_floats = operation(f32x16, i32x16)(lambda b, x: b.bitcast(x, e.wide(e.f32)))
total = operation(f32, f32x16)(lambda b, x: e.total(b, x))
total_int = operation(i32, i32x16)(lambda b, x: e.total(b, x))
largest = operation(f32, f32x16)(lambda b, x: e.largest(b, x))
exp = operation(f32x16, f32x16)(lambda b, x: e.exp(b, x, FUSED))
log = operation(f32x16, f32x16)(lambda b, x: e.log(b, x, FUSED))
sigmoid = operation(f32x16, f32x16)(lambda b, x: e.sigmoid(b, x, FUSED))
silu = operation(f32x16, f32x16)(lambda b, x: e.silu(b, x, FUSED))
softplus = operation(f32x16, f32x16)(lambda b, x: e.softplus(b, x, FUSED))


@operation(i32x16, i32x16, i64)
def shift_left(b, x, n):
    """Each lane shifted by the same n < 32 bits."""
    return b.shl(x, e.splat(b, b.trunc(n, e.i32)))


@operation(i32x16, i32x16, i64)
def shift_right(b, x, n):
    """Arithmetic shift."""
    return b.ashr(x, e.splat(b, b.trunc(n, e.i32)))


@operation(i32x16)
def lane_numbers(b):
    """0, 1, .. 15."""
    return ir.Constant(e.wide(e.i32), list(range(e.LANES)))
