"""Cache types in a page: where their numbers lie, how 32 dims are rounded, stored and read.

A page holds 32 tokens; in it each KV head has one block, the planes of its `KVFormat` one behind
the other. With d the head size rounded up to a multiple of 16, a plane of K is transposed, [d over
its dims][32 tokens], so that attention reads 16 keys at once; a plane of V is [32 tokens][d over
its dims]. Dims that a head does not have are zeros.

A further type is a row of ops/kv_formats.py and, where it has a scale, its rounding in `_ROUND`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from runtime.ops.errors import BackendError
from runtime.ops.kv_formats import GROUP, PAGE, SMALLEST, KVFormat, Plane, padded_head

from . import emit as e
from . import simd as s
from .emit import number, times
from .rows import helper

Value = Any
padded = helper(padded_head)


def _same(b: ir.IRBuilder, value: Value) -> Value:
    return value


# dtype -> 16 lanes as they are stored, of float32 or of int32 codes; and back to float32
_CONVERT: dict[str, tuple[Callable, Callable]] = {
    "f32": (_same, _same),
    "f16": (
        lambda b, x: e.float_to_half(b, x, s.HALVES),
        lambda b, x: e.half_to_float(b, x, s.HALVES),
    ),
    "bf16": (e.float_to_brain, e.brain_to_float),
    "i8": (
        lambda b, x: b.trunc(x, e.wide(e.i8)),
        lambda b, x: b.sitofp(b.sext(x, e.wide(e.i32)), e.wide(e.f32)),
    ),
}
_ELEMENT = {"f32": e.f32, "f16": e.i16, "bf16": e.i16, "i8": e.i8}


def _q8_0(b: ir.IRBuilder, low: Value, high: Value) -> tuple[list[Value], list[Value]]:
    """q = x * (1 / (max|x| / 127)) to the nearest even, and max|x| / 127."""
    zero, one = (ir.Constant(e.f32, value) for value in (0.0, 1.0))
    peak = e.largest(b, e.larger(b, e.absolute(b, low), e.absolute(b, high)))
    some = b.fcmp_ordered(">=", peak, ir.Constant(e.f32, e.single(SMALLEST)))
    scale = b.select(some, b.fdiv(peak, ir.Constant(e.f32, 127.0)), zero)
    inverse = e.splat(b, b.select(some, b.fdiv(one, scale), zero))
    return [e.nearest_int(b, b.fmul(x, inverse)) for x in (low, high)], [scale]


# cache type -> (builder, first 16 dims, other 16): their codes, and the numbers of the group
_ROUND: dict[str, Callable] = {"q8_0": _q8_0}


def _rounding(format: KVFormat) -> Callable:
    if not format.shared:
        return lambda b, low, high: ([low, high], [])
    if format.name not in _ROUND:
        raise BackendError(
            f"KV type {format.name!r} has no rounding: add it to _ROUND in "
            "backends/cpu/kernels/kv_planes.py"
        )
    return _ROUND[format.name]


def codes_of(format: KVFormat) -> Plane:
    """The plane of its values. BackendError: it is not one of the kinds that kernels read."""
    if len(format.codes) > 1 or format.codes[0].dtype.name not in _CONVERT:
        raise BackendError(
            f"KV type {format.name!r} keeps its values in {', '.join(map(str, format.codes))}, and "
            f"kernels read one plane of {', '.join(_CONVERT)}: add it to load16 and store_group in "
            "backends/cpu/kernels/kv_planes.py"
        )
    return format.codes[0]


def _start(b: ir.IRBuilder, format: KVFormat, plane: Plane, block: Value, dims: Value) -> Value:
    """Where a plane of a block begins; dims: of the padded head."""
    for before in format.planes[: format.planes.index(plane)]:
        size = PAGE * before.dtype.nbytes
        block = b.add(block, times(b, _width(b, before, dims), size))
    return block


def _width(b: ir.IRBuilder, plane: Plane, dims: Value) -> Value:
    if plane.dims == 1:
        return dims
    return b.udiv(b.add(dims, number(plane.dims - 1)), number(plane.dims))


def k_step(plane: Plane) -> int:
    """Bytes from one dim of K to the next, dims being taken in whole numbers."""
    return PAGE * plane.dtype.nbytes // plane.dims


def k_place(
    b: ir.IRBuilder, format: KVFormat, plane: Plane, block: Value, dim: Value, dims: Value
) -> Value:
    """The address of what the 32 tokens of a block of K have in a plane at a dim."""
    return b.add(_start(b, format, plane, block, dims), times(b, dim, k_step(plane)))


def v_place(
    b: ir.IRBuilder, format: KVFormat, plane: Plane, block: Value, key: Value, dim: Value,
    dims: Value,
) -> Value:  # fmt: skip
    """The address of what one token of a block of V has in a plane at a dim."""
    i = b.mul(key, _width(b, plane, dims))
    i = b.add(i, dim if plane.dims == 1 else b.udiv(dim, number(plane.dims)))
    return b.add(_start(b, format, plane, block, dims), times(b, i, plane.dtype.nbytes))


def load16(b: ir.IRBuilder, plane: Plane, address: Value) -> Value:
    """16 numbers that lie side by side, as float32."""
    value = e.load(b, address, e.wide(_ELEMENT[plane.dtype.name]), 1)
    return _CONVERT[plane.dtype.name][1](b, value)


def load_splat(b: ir.IRBuilder, plane: Plane, address: Value) -> Value:
    """One number in all lanes, as float32."""
    value = e.splat(b, e.load(b, address, _ELEMENT[plane.dtype.name], 1))
    return _CONVERT[plane.dtype.name][1](b, value)


def store_group(format: KVFormat, which: str) -> Any:
    """(low, high, block, place, dim, dims): dims dim.. of a token, 32 or the last 16, rounded.

    low, high: their values, float32; block: of the KV head in its page; place: the token's there.
    """
    codes, is_k, rounding = codes_of(format), which == "k", _rounding(format)

    def address(b, plane, block, place, dim, dims):
        if not is_k:
            return v_place(b, format, plane, block, place, dim, dims)
        at = k_place(b, format, plane, block, dim, dims)
        return b.add(at, times(b, place, plane.dtype.nbytes))

    def store16(b, value, at):
        value = _CONVERT[codes.dtype.name][0](b, value)
        if not is_k:
            e.store(b, value, at, 1)
            return
        for lane in range(e.LANES):
            one = b.extract_element(value, ir.Constant(e.i32, lane))
            e.store(b, one, e.offset(b, at, lane * k_step(codes)), codes.dtype.nbytes)

    @s.operation(s.void, s.f32x16, s.f32x16, s.i64, s.i64, s.i64, s.i64)
    def put(b, low, high, block, place, dim, dims):
        halves, shared = rounding(b, low, high)
        at = address(b, codes, block, place, dim, dims)
        store16(b, halves[0], at)
        with b.if_then(b.icmp_signed("<", b.add(dim, number(GROUP // 2)), dims)):
            step = k_step(codes) if is_k else codes.dtype.nbytes
            store16(b, halves[1], e.offset(b, at, GROUP // 2 * step))
        for plane, value in zip(format.shared, shared, strict=True):
            lanes = _CONVERT[plane.dtype.name][0](b, e.splat(b, value))
            one = b.extract_element(lanes, ir.Constant(e.i32, 0))
            at = address(b, plane, block, place, dim, dims)
            e.store(b, one, at, plane.dtype.nbytes)

    return put
