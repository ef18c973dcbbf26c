"""LLVM IR building blocks of the kernels: 16-lane vectors, legalised for any instruction set.

Everything is written on `<16 x float>` and `<16 x i32>`, so the order of every addition, and with
it every bit, is the same on AVX-512, AVX2, NEON and SSE2. Only FMA differs: a target without it
multiplies and adds. Nothing here may become a call into libm or the compiler's runtime: rounding
uses the 1.5 * 2^23 trick, and f16 conversions take an integer path where the target lacks them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from llvmlite import ir
from numba.core import cgutils

from runtime.backends.cpu import llvm
from runtime.backends.cpu.llvm import (  # noqa: F401  (kernels use all of these as e.NAME)
    Value,
    fma,
    half_to_float,
    intrinsic_call,
    load,
    pointer,
    prefetch,
    store,
)
from runtime.backends.cpu.llvm import (
    const as number,
)

LANES = 16
i1, i8, i16, i32, i64 = llvm.I1, llvm.I8, llvm.I16, llvm.I32, llvm.I64
f16, f32, f64 = llvm.F16, llvm.F32, llvm.F64

_ROUND = 12582912.0  # 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits


def wide(element: ir.Type) -> ir.VectorType:
    """The type of 16 lanes of `element`."""
    return llvm.vec(element, LANES)


def constant(value: float, element: ir.Type = f32) -> ir.Constant:
    """All 16 lanes equal to `value`; floats are rounded to float32 by the caller or are exact."""
    return llvm.fill(element, value, LANES)


def single(value: float) -> float:
    """`value` rounded to float32, which llvmlite demands of a float constant's digits."""
    import struct

    return struct.unpack("f", struct.pack("f", value))[0]


def floats(value: float) -> ir.Constant:
    """All 16 lanes equal to `value`, rounded to float32."""
    return constant(single(value), f32)


def ints(value: int, element: ir.Type = i32) -> ir.Constant:
    """Lanes of an integer constant, given signed or as an unsigned bit pattern."""
    bits = element.width
    return constant(value - (1 << bits) if value >= 1 << (bits - 1) else value, element)


def load_first(b: ir.IRBuilder, address: Value, n: Value, fill: Value | None = None) -> Value:
    """The first n < 16 floats at an address, `fill` (zero) behind; reads nothing beyond them."""
    room = cgutils.alloca_once(b, wide(f32))
    b.store(floats(0.0) if fill is None else splat(b, fill), room)
    target, source = b.bitcast(room, f32.as_pointer()), pointer(b, address, f32)
    with cgutils.for_range(b, n) as loop:
        value = b.load(b.gep(source, [loop.index]))
        value.align = 4
        b.store(value, b.gep(target, [loop.index]))
    return b.load(room)


def store_first(b: ir.IRBuilder, value: Value, address: Value, n: Value) -> None:
    """Store the first n < 16 of 16 floats and touch nothing beyond them."""
    room = cgutils.alloca_once(b, wide(f32))
    b.store(value, room)
    source, target = b.bitcast(room, f32.as_pointer()), pointer(b, address, f32)
    with cgutils.for_range(b, n) as loop:
        b.store(b.load(b.gep(source, [loop.index])), b.gep(target, [loop.index])).align = 4


def offset(b: ir.IRBuilder, address: Value, n_bytes: int) -> Value:
    """The address `n_bytes` further on; no instruction for 0."""
    return b.add(address, number(n_bytes)) if n_bytes else address


def times(b: ir.IRBuilder, value: Value, factor: int) -> Value:
    """value * factor; no instruction for 1."""
    return b.mul(value, number(factor)) if factor != 1 else value


def splat(b: ir.IRBuilder, value: Value) -> Value:
    """All 16 lanes equal to a scalar."""
    return llvm.splat(b, value, LANES)


def lanes_of(b: ir.IRBuilder, value: Value, picked: Sequence[int]) -> Value:
    """A vector of the lanes `picked`, in that order."""
    return llvm.shuffle(b, value, value, picked)


def larger(b: ir.IRBuilder, x: Value, y: Value) -> Value:
    """Lane-wise max; y where either is NaN."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def smaller(b: ir.IRBuilder, x: Value, y: Value) -> Value:
    """Lane-wise min; y where either is NaN."""
    return b.select(b.fcmp_ordered("<", x, y), x, y)


def larger_int(b: ir.IRBuilder, x: Value, y: Value) -> Value:
    """Lane-wise max of signed integers; of the bits of floats >= 0 also theirs, NaN the largest."""
    return b.select(b.icmp_signed(">", x, y), x, y)


def absolute(b: ir.IRBuilder, x: Value) -> Value:
    """|x| by clearing the sign: -0 gives 0, NaN stays."""
    return b.bitcast(b.and_(b.bitcast(x, wide(i32)), ints(0x7FFFFFFF)), wide(f32))


def nearest(b: ir.IRBuilder, x: Value) -> Value:
    """Round half to even as float, never to -0; |x| < 2^22."""
    return b.fsub(b.fadd(x, constant(_ROUND)), constant(_ROUND))


def nearest_int(b: ir.IRBuilder, x: Value) -> Value:
    """Round half to even as int32; |x| < 2^22 (other values give some integer, never a fault)."""
    return b.sub(b.bitcast(b.fadd(x, constant(_ROUND)), wide(i32)), ints(0x4B400000))


def halves(b: ir.IRBuilder, x: Value, combine: Callable[[Value, Value], Value]) -> Value:
    """Fold 16 lanes to one in ONE fixed tree: lane i with lane i+8, then i+4, i+2, i+1."""
    width = LANES
    while width > 1:
        width //= 2
        low, high = range(width), range(width, 2 * width)
        x = combine(lanes_of(b, x, list(low)), lanes_of(b, x, list(high)))
    return b.extract_element(x, ir.Constant(i32, 0))


def total(b: ir.IRBuilder, x: Value) -> Value:
    """Sum of 16 lanes (float or int) in the fixed tree order."""
    is_float = x.type.element == f32
    return halves(b, x, b.fadd if is_float else b.add)


def largest(b: ir.IRBuilder, x: Value) -> Value:
    """The largest of 16 lanes, in the fixed tree order."""
    return halves(b, x, lambda low, high: larger(b, low, high))


def float_to_half(b: ir.IRBuilder, x: Value, native: bool) -> Value:
    """16 lanes of f32 to f16 bit patterns (i16), to nearest even; overflow gives infinity."""
    if native:
        return b.bitcast(b.fptrunc(x, wide(f16)), wide(i16))
    bits = b.bitcast(x, wide(i32))
    sign = b.and_(bits, ints(0x80000000))
    u = b.xor(bits, sign)
    # Normal results: rebias the exponent and round on the 13 bits that fall off.
    odd = b.and_(b.lshr(u, ints(13)), ints(1))
    normal = b.lshr(b.add(b.add(u, ints((15 - 127 << 23) + 0xFFF & 0xFFFFFFFF)), odd), ints(13))
    # Subnormal results: adding 0.5 makes the float adder shift and round the mantissa.
    shifted = b.fadd(b.bitcast(u, wide(f32)), floats(0.5))
    tiny = b.sub(b.bitcast(shifted, wide(i32)), ints(0x3F000000))
    infinite = b.select(b.icmp_unsigned(">", u, ints(0x7F800000)), ints(0x7E00), ints(0x7C00))
    half = b.select(b.icmp_unsigned("<", u, ints(113 << 23)), tiny, normal)
    half = b.select(b.icmp_unsigned(">=", u, ints(143 << 23)), infinite, half)
    return b.trunc(b.or_(half, b.lshr(sign, ints(16))), wide(i16))


def brain_to_float(b: ir.IRBuilder, bits: Value) -> Value:
    """16 lanes of bf16 bit patterns (i16) to f32, exactly."""
    return b.bitcast(b.shl(b.zext(bits, wide(i32)), ints(16)), wide(f32))


def float_to_brain(b: ir.IRBuilder, x: Value) -> Value:
    """16 lanes of f32 to bf16 bit patterns (i16), to nearest even; NaN stays NaN."""
    u = b.bitcast(x, wide(i32))
    odd = b.and_(b.lshr(u, ints(16)), ints(1))
    rounded = b.lshr(b.add(b.add(u, ints(0x7FFF)), odd), ints(16))
    quiet = b.or_(b.lshr(u, ints(16)), ints(0x40))
    return b.trunc(b.select(b.fcmp_unordered("uno", x, x), quiet, rounded), wide(i16))


def horner(b: ir.IRBuilder, x: Value, coefficients: Sequence[float], fused: bool) -> Value:
    """A polynomial, highest power first."""
    value: Value = floats(coefficients[0])
    for c in coefficients[1:]:
        value = fma(b, value, x, floats(c), fused)
    return value


_LN2_HIGH = 0.693359375  # 9 bits: a product with |n| <= 2^14 is exact
_LN2_LOW = math.log(2) - _LN2_HIGH
_EXP = [1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0]


def power_of_two(b: ir.IRBuilder, n: Value) -> Value:
    """2^n for integer lanes in -126..127."""
    return b.bitcast(b.shl(b.add(n, ints(127)), ints(23)), wide(f32))


def exp(b: ir.IRBuilder, x: Value, fused: bool) -> Value:
    """e^x within 2 ulp; 0 for -inf, inf above 88.73, NaN stays NaN.

    x = n ln 2 + r with |r| <= ln(2)/2, Taylor polynomial of degree 7 (remainder 5e-9) for e^r, and
    2^n in two factors so that subnormal results round once.
    """
    x = smaller(b, floats(90.0), x)
    x = larger(b, floats(-120.0), x)
    n = nearest(b, b.fmul(x, floats(1 / math.log(2))))
    r = fma(b, n, floats(-_LN2_HIGH), x, fused)
    r = fma(b, n, floats(-_LN2_LOW), r, fused)
    value = horner(b, r, _EXP, fused)
    whole = nearest_int(b, n)
    first = b.ashr(whole, ints(1))
    value = b.fmul(value, power_of_two(b, first))
    return b.fmul(value, power_of_two(b, b.sub(whole, first)))


def sigmoid(b: ir.IRBuilder, x: Value, fused: bool) -> Value:
    """1 / (1 + e^-x)."""
    negative = b.fneg(x)
    return b.fdiv(floats(1.0), b.fadd(floats(1.0), exp(b, negative, fused)))


def silu(b: ir.IRBuilder, x: Value, fused: bool) -> Value:
    """x / (1 + e^-x)."""
    return b.fdiv(x, b.fadd(floats(1.0), exp(b, b.fneg(x), fused)))


# log(1 + t) = t - t^2/2 + t^3 p(t) on sqrt(1/2) - 1 <= t <= sqrt(2) - 1 (Cephes logf, S. Moshier).
_LOG = [
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
]


def _log_series(b: ir.IRBuilder, t: Value, n: Value, fused: bool) -> Value:
    """log(1 + t) + n ln 2 for t in the range of the polynomial and whole n."""
    square = b.fmul(t, t)
    value = b.fmul(b.fmul(horner(b, t, _LOG, fused), t), square)
    value = fma(b, n, floats(_LN2_LOW), value, fused)
    value = fma(b, square, floats(-0.5), value, fused)
    return fma(b, n, floats(_LN2_HIGH), b.fadd(t, value), fused)


def log(b: ir.IRBuilder, x: Value, fused: bool) -> Value:
    """Natural logarithm within 2 ulp; -inf for 0 and subnormals, NaN below 0, inf for inf."""
    bits = b.bitcast(x, wide(i32))
    shifted = b.sub(bits, ints(0x3F3504F3))  # the mantissa lands in [sqrt(1/2), sqrt(2))
    n = b.sitofp(b.ashr(shifted, ints(23)), wide(f32))
    mantissa = b.add(b.and_(shifted, ints(0x007FFFFF)), ints(0x3F3504F3))
    value = _log_series(b, b.fsub(b.bitcast(mantissa, wide(f32)), floats(1.0)), n, fused)
    value = b.select(b.fcmp_ordered("<", x, floats(2.0**-126)), floats(-math.inf), value)
    bad = b.fcmp_unordered("<", x, floats(0.0))
    value = b.select(bad, floats(math.nan), value)
    return b.select(b.fcmp_ordered("==", x, floats(math.inf)), x, value)


def softplus(b: ir.IRBuilder, x: Value, fused: bool) -> Value:
    """log(1 + e^x) = max(x, 0) + log(1 + e^-|x|) within 4 ulp; NaN stays NaN."""
    power = exp(b, b.fneg(absolute(b, x)), fused)  # in [0, 1]
    large = b.fcmp_ordered(">", power, floats(math.sqrt(2) - 1))
    half = b.fmul(b.fsub(power, floats(1.0)), floats(0.5))  # 1 + power = 2 (1 + half)
    t = b.select(large, half, power)
    n = b.select(large, floats(1.0), floats(0.0))
    return b.fadd(larger(b, x, floats(0.0)), _log_series(b, t, n, fused))
