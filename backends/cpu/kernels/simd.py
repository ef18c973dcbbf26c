"""The SIMD layer that kernels are written in: vectors of 16 lanes as Numba values.

`f32x16`, `i32x16` and `m16` (comparison results) take the operators + - * / < <= > >= == & | << >>
and the functions below. Addresses are int64, offsets are in bytes. `FUSED` and `HALVES` say what
the instruction set this process compiles for can do; kernels never ask, the operations do.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, lower_builtin, register_model, type_callable

from . import emit as e
from .target import chosen


class Vector(types.Type):
    """16 lanes of a scalar type, passed by value."""

    def __init__(self, element: types.Type) -> None:
        self.element = element
        super().__init__(name=f"{element}x16")


f32x16, i32x16, m16 = (Vector(t) for t in (types.float32, types.int32, types.boolean))
f32, i32, i64 = types.float32, types.int32, types.int64
void = types.void


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    """A vector is one LLVM vector value everywhere: variable, argument and result."""

    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        lanes = e.i1 if fe_type is m16 else dmm.lookup(fe_type.element).get_value_type()
        super().__init__(dmm, fe_type, e.wide(lanes))


FUSED, HALVES = chosen().has_fma, chosen().has_f16


def operation(result: types.Type, *parameters: types.Type) -> Callable:
    """Make `emit(builder, *values)` callable from kernels with this one signature."""

    def wrap(emit: Callable) -> Any:
        def typer(typingctx, *args):
            if len(args) != len(parameters):
                return None

            def codegen(context, builder, signature, values):
                value = emit(builder, *values)
                return context.get_dummy_value() if value is None else value

            return result(*parameters), codegen

        names = list(inspect.signature(emit).parameters)[1:]
        typer.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in ["ctx", *names]]
        )
        typer.__name__ = emit.__name__
        typer.__doc__ = emit.__doc__
        return intrinsic(typer)

    return wrap


def _define(function: Callable, result: types.Type, arity: int, emit: Callable, on: Vector) -> None:
    """Give a Python operator a meaning for vectors of one type."""

    def typing(context):
        if arity == 1:
            return lambda x: result if x is on else None
        return lambda x, y: result if x is on and y is on else None

    type_callable(function)(typing)

    def lower(context, builder, signature, values):
        return emit(builder, *values)

    lower_builtin(function, *[on] * arity)(lower)


def _compare(symbol: str, is_float: bool) -> Callable:
    if is_float:
        return lambda b, x, y: b.fcmp_ordered(symbol, x, y)
    return lambda b, x, y: b.icmp_signed(symbol, x, y)


def _define_operators() -> None:
    for function, name in (
        (operator.add, "add"),
        (operator.sub, "sub"),
        (operator.mul, "mul"),
    ):
        _define(function, f32x16, 2, getattr(ir.IRBuilder, "f" + name), f32x16)
        _define(function, i32x16, 2, getattr(ir.IRBuilder, name), i32x16)
    _define(operator.truediv, f32x16, 2, ir.IRBuilder.fdiv, f32x16)
    _define(operator.neg, f32x16, 1, ir.IRBuilder.fneg, f32x16)
    _define(operator.neg, i32x16, 1, ir.IRBuilder.neg, i32x16)
    for function, name in (
        (operator.and_, "and_"),
        (operator.or_, "or_"),
        (operator.xor, "xor"),
    ):
        for on in (i32x16, m16):
            _define(function, on, 2, getattr(ir.IRBuilder, name), on)
    for function, symbol in (
        (operator.lt, "<"),
        (operator.le, "<="),
        (operator.gt, ">"),
        (operator.ge, ">="),
        (operator.eq, "=="),
    ):
        _define(function, m16, 2, _compare(symbol, True), f32x16)
        _define(function, m16, 2, _compare(symbol, False), i32x16)


_define_operators()


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
    e.store(b, value, address, 4)


@operation(void, i64, i64)
def store_i32(b, address, value):
    e.store(b, b.trunc(value, e.i32), address, 4)


@operation(void, i64, i64)
def store_i8(b, address, value):
    e.store(b, b.trunc(value, e.i8), address, 1)


@operation(void, i64, i64)
def store_i64(b, address, value):
    e.store(b, value, address, 8)


@operation(void, i64, i64)
def store_i16(b, address, value):
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
    room = cgutils.alloca_once(b, e.wide(e.f32))
    b.store(e.splat(b, fill), room)
    target, source = b.bitcast(room, e.f32.as_pointer()), e.pointer(b, address, e.f32)

    def copy(i):
        value = b.load(b.gep(source, [i]))
        value.align = 4
        b.store(value, b.gep(target, [i]))

    _each_of(b, n, copy)
    return b.load(room)


@operation(void, i64, f32x16, i64)
def store_part(b, address, value, n):
    """Store the first n < 16 lanes and touch nothing beyond them."""
    room = cgutils.alloca_once(b, e.wide(e.f32))
    b.store(value, room)
    source, target = b.bitcast(room, e.f32.as_pointer()), e.pointer(b, address, e.f32)

    def copy(i):
        b.store(b.load(b.gep(source, [i])), b.gep(target, [i])).align = 4

    _each_of(b, n, copy)


@operation(void, i64)
def prefetch(b, address):
    """Ask for the cache line at an address, to be read soon; any address is allowed."""
    arguments = [ir.Constant(e.i32, v) for v in (0, 3, 1)]
    ty = ir.FunctionType(ir.VoidType(), [e.i8.as_pointer(), e.i32, e.i32, e.i32])
    function = cgutils.get_or_insert_function(b.module, ty, "llvm.prefetch.p0")
    b.call(function, [e.pointer(b, address, e.i8), *arguments])


# --- arithmetic


@operation(f32x16, f32)
def splat(b, value):
    return e.splat(b, value)


@operation(i32x16, i64)
def splat_int(b, value):
    return e.splat(b, b.trunc(value, e.i32))


@operation(f32x16, f32x16, f32x16, f32x16)
def fma(b, x, y, z):
    """x * y + z, fused where the instruction set can."""
    return e.fma(b, x, y, z, FUSED)


@operation(f32, f32, f32, f32)
def fma_f32(b, x, y, z):
    return e.fma(b, x, y, z, FUSED)


@operation(f32x16, m16, f32x16, f32x16)
def select(b, mask, x, y):
    return b.select(mask, x, y)


@operation(i32x16, m16, i32x16, i32x16)
def select_ints(b, mask, x, y):
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


@operation(i32x16, i32x16, i64)
def shift_left(b, x, n):
    return b.shl(x, e.splat(b, b.trunc(n, e.i32)))


@operation(i32x16, i32x16, i64)
def shift_right(b, x, n):
    """Arithmetic shift."""
    return b.ashr(x, e.splat(b, b.trunc(n, e.i32)))


@operation(i32x16)
def lane_numbers(b):
    return ir.Constant(e.wide(e.i32), list(range(e.LANES)))
