"""The SIMD layer that kernels are written in: vectors of 16 lanes as Numba values.

`f32x16`, `i32x16` and `m16` (comparison results) take the operators + - * / < <= > >= == & | ^ and
the functions below. Addresses are int64, offsets are in bytes. `FUSED` and `HALVES` say what the
instruction set this process compiles for can do; kernels never ask, the operations do.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from . import emit as e
from .target import chosen
from .vectors import f32x16, i32x16, m16, operation

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


@operation(f32, f32)
def exp_f32(b, value):
    """e^x of a scalar, with the bits of `exp`: that of all lanes, of which one is taken."""
    return b.extract_element(e.exp(b, e.splat(b, value), FUSED), ir.Constant(e.i32, 0))


@operation(f32, f32)
def sqrt_f32(b, value):
    """Correctly rounded square root: one instruction on every target."""
    return e.intrinsic_call(b, "llvm.sqrt.f32", e.f32, [value])


# --- vectors at addresses


@operation(f32x16, i64)
def load(b, address):
    """16 floats, at any address."""
    return e.load(b, address, e.wide(e.f32), 1)


@operation(void, i64, f32x16)
def store(b, address, value):
    """16 floats, at any address."""
    e.store(b, value, address, 1)


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
            with cgutils.for_range(b, n) as loop:
                one = b.load(b.gep(lanes, [loop.index]))
                e.store(b, one, b.add(address, b.mul(stride, loop.index)), 4)


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
total = operation(f32, f32x16)(lambda b, x: e.total(b, x))
largest = operation(f32, f32x16)(lambda b, x: e.largest(b, x))
exp = operation(f32x16, f32x16)(lambda b, x: e.exp(b, x, FUSED))
log = operation(f32x16, f32x16)(lambda b, x: e.log(b, x, FUSED))
sigmoid = operation(f32x16, f32x16)(lambda b, x: e.sigmoid(b, x, FUSED))
silu = operation(f32x16, f32x16)(lambda b, x: e.silu(b, x, FUSED))
softplus = operation(f32x16, f32x16)(lambda b, x: e.softplus(b, x, FUSED))


@operation(i32x16)
def lane_numbers(b):
    """0, 1, .. 15."""
    return ir.Constant(e.wide(e.i32), list(range(e.LANES)))
