"""LLVM IR building blocks of all CPU kernels, on llvmlite alone.

Addresses are int64 values; vectors may have any number of lanes. On it stand the functions of 16
lanes that Numba kernels use (`kernels/emit.py`) and the builder of whole kernels of the tile
(`tile/vector.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from llvmlite import ir

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
Value = Any  # an llvmlite value; llvmlite itself carries no types


# llvmlite writes out every type and constant that is made: kernels share theirs.
@functools.cache
def vec(kind: ir.Type, n: int) -> ir.VectorType:
    """The LLVM vector type of `n` values of `kind`."""
    return ir.VectorType(kind, n)


@functools.cache
def const(value: int) -> ir.Constant:
    """The int64 constant `value`: a size or an address."""
    return ir.Constant(I64, value)


def fill(kind: ir.Type, value: float, n: int) -> ir.Constant:
    """A constant vector of `value`; floats are rounded to their kind by the caller or are exact."""
    return ir.Constant(vec(kind, n), ir.Constant(kind, value))


@functools.cache
def undefined(kind: ir.Type) -> ir.Constant:
    """A value of `kind` that may be anything."""
    return ir.Constant(kind, ir.Undefined)


@functools.cache
def lanes(*numbers: int) -> ir.Constant:
    """A constant vector of int32: which lanes to pick."""
    return ir.Constant(vec(I32, len(numbers)), list(numbers))


def pointer(b: ir.IRBuilder, address: Value, kind: ir.Type) -> Value:
    """The int64 address as a pointer to `kind`."""
    return b.inttoptr(address, kind.as_pointer())


def load(b: ir.IRBuilder, address: Value, kind: ir.Type, align: int) -> Value:
    """The value of type `kind` at an int64 address."""
    value = b.load(pointer(b, address, kind))
    value.align = align
    return value


def store(b: ir.IRBuilder, value: Value, address: Value, align: int) -> None:
    """Store `value` at an int64 address."""
    b.store(value, pointer(b, address, value.type)).align = align


def prefetch(b: ir.IRBuilder, address: Value, near: int = 3) -> None:
    """Ask for the cache line at `address`, soon to be read; never faults.

    near: 3 into the first level of the cache, 2 into the second.
    """
    place = pointer(b, address, I8)
    # Intrinsics over typed pointers (LLVM before 17) carry the pointed-to type in the name.
    name = "llvm.prefetch.p0" + ("i8" if str(place.type) == "i8*" else "")
    how = [ir.Constant(I32, v) for v in (0, near, 1)]
    intrinsic_call(b, name, ir.VoidType(), [place, *how])


def splat(b: ir.IRBuilder, value: Value, n: int) -> Value:
    """A vector with `value` in every lane."""
    undef = undefined(vec(value.type, n))
    first = b.insert_element(undef, value, ir.Constant(I32, 0))
    return b.shuffle_vector(first, undef, lanes(*[0] * n))


def shuffle(b: ir.IRBuilder, x: Value, y: Value, picks: Sequence[int]) -> Value:
    """Lanes of x, then of y, by number."""
    return b.shuffle_vector(x, y, lanes(*picks))


def intrinsic_call(b: ir.IRBuilder, name: str, result: ir.Type, args: Sequence[Value]) -> Value:
    """Call the LLVM intrinsic `name`."""
    kind = ir.FunctionType(result, [a.type for a in args])
    function = b.module.globals.get(name) or ir.Function(b.module, kind, name)
    return b.call(function, list(args))


def fma(b: ir.IRBuilder, x: Value, y: Value, z: Value, fused: bool) -> Value:
    """x * y + z, rounded once where the target can (`fused`), else after the product too."""
    if not fused:
        return b.fadd(b.fmul(x, y), z)
    lanes = f"v{x.type.count}" if isinstance(x.type, ir.VectorType) else ""
    return intrinsic_call(b, f"llvm.fma.{lanes}f32", x.type, [x, y, z])


def half_to_float(b: ir.IRBuilder, bits: Value, native: bool) -> Value:
    """float32 of float16 bit patterns (a vector of int16); exact, infinities and NaN too."""
    n = bits.type.count
    if native:
        return b.fpext(b.bitcast(bits, vec(F16, n)), vec(F32, n))
    wide = vec(I32, n)
    whole = b.zext(bits, wide)
    sign = b.shl(b.and_(whole, fill(I32, 0x8000, n)), fill(I32, 16, n))
    magnitude = b.shl(b.and_(whole, fill(I32, 0x7FFF, n)), fill(I32, 13, n))
    # Read as float32 the exponent is 112 too small, denormals included: one exact product.
    scaled = b.fmul(b.bitcast(magnitude, vec(F32, n)), fill(F32, 2.0**112, n))
    special = b.icmp_unsigned(">=", magnitude, fill(I32, 0x0F800000, n))
    top = b.or_(magnitude, fill(I32, 0x7F800000, n))
    bits32 = b.select(special, top, b.bitcast(scaled, wide))
    return b.bitcast(b.or_(bits32, sign), vec(F32, n))
