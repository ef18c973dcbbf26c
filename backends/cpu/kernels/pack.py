"""Activations packed for the matmul tiles, with the op before the matmul fused in.

A tile is C consecutive rows (the matmul's columns). Kind "f32": [n][C] float32. Kind "int8": n/32
blocks [C][32] int8, then n/32 blocks of side data [5][C] of four bytes each:
    d (f32 scale) | d * sum(q) (f32) | -8 * sum(q) | -8 * sum(q[:16]) | -8 * sum(q[16:])   (int32)
with d = max|x| / 127 and q = x * (1/d) to the nearest even; a block below 1e-30 counts as zero.
The last three let a tile start its integer dot product from the correction for unsigned weights.
Kind "split": n/32 blocks [3][C][32] bfloat16, three pieces that add up to the float32 value: each
is the leading eight bits of what is left.

Parallel over (tile x units of 32 or 16 elements), so one row keeps every thread busy; each thread
computes a row's norm for itself, in the same order. Columns without a row are zeros.
"""

from __future__ import annotations

from llvmlite import ir

from . import emit as e
from . import simd as s
from .rows import helper, inverse_rms, share

_SMALLEST = 1e-30  # below it 1/d could overflow and d lose its bits


def _store_lane(b, value, address, offset):
    e.store(b, value, b.add(address, offset), 4)


@s.operation(s.void, s.f32x16, s.f32x16, s.i64, s.i64, s.i64)
def quantise(b, low, high, quants, side, column_bytes):
    """One block of 32 values to int8 with its side data; `column_bytes` = 4 * C."""
    peak = e.largest(b, e.larger(b, e.absolute(b, low), e.absolute(b, high)))
    empty = b.fcmp_unordered("<", peak, ir.Constant(e.f32, e.single(_SMALLEST)))
    zero, one = ir.Constant(e.f32, 0.0), ir.Constant(e.f32, 1.0)
    d = b.select(empty, zero, b.fdiv(peak, ir.Constant(e.f32, 127.0)))
    inverse = e.splat(b, b.select(empty, zero, b.fdiv(one, b.select(empty, one, d))))
    sums = []
    for i, part in enumerate((low, high)):
        q = e.nearest_int(b, b.fmul(part, inverse))
        sums.append(e.total(b, q))
        e.store(b, b.trunc(q, e.wide(e.i8)), e.offset(b, quants, 16 * i), 1)
    whole = b.add(*sums)
    rows = [d, b.fmul(d, b.sitofp(whole, e.f32))]
    rows += [b.mul(v, ir.Constant(e.i32, -8)) for v in (whole, *sums)]
    for i, value in enumerate(rows):
        _store_lane(b, value, side, b.mul(column_bytes, ir.Constant(e.i64, i)))


@s.operation(s.void, s.f32x16, s.i64, s.i64)
def split(b, value, target, piece_bytes):
    """16 values as three bfloat16 pieces, `piece_bytes` apart."""
    for _ in range(3):
        bits = b.and_(b.bitcast(value, e.wide(e.i32)), e.ints(0xFFFF0000))
        piece = b.trunc(b.lshr(bits, e.ints(16)), e.wide(e.i16))
        e.store(b, piece, target, 2)
        value = b.fsub(value, b.bitcast(bits, e.wide(e.f32)))
        target = b.add(target, piece_bytes)


@helper
def plain(a, b, factor, i):
    return s.load(a + i * 4)


@helper
def plain_part(a, b, factor, i, n):
    return s.load_part(a + i * 4, n, s.f32(0))


@helper
def normed(a, b, factor, i):
    value = s.load(a + i * 4) * factor
    if b != 0:
        value = value * s.load(b + i * 4)
    return value


@helper
def normed_part(a, b, factor, i, n):
    value = s.load_part(a + i * 4, n, s.f32(0)) * factor
    if b != 0:
        value = value * s.load_part(b + i * 4, n, s.f32(0))
    return value


@helper
def gated(a, b, factor, i):
    return s.silu(s.load(a + i * 4)) * s.load(b + i * 4)


@helper
def gated_part(a, b, factor, i, n):
    return s.silu(s.load_part(a + i * 4, n, s.f32(0))) * s.load_part(b + i * 4, n, s.f32(0))


_PLAIN, _NORMED, _GATED = (plain, plain_part), (normed, normed_part), (gated, gated_part)


def column_packer(C, kind, source):
    """(filled, a, b, factor, tile, column, first, last, n): one column's units first..last-1."""
    value, value_part = source

    @helper
    def int8_column(filled, a, b, factor, tile, column, first, last, n):
        quants = tile + column * 32
        side = tile + n * C + column * 4
        zero = s.splat(s.f32(0))
        for unit in range(first, last):
            low, high = zero, zero
            if filled:
                low = value(a, b, factor, unit * 32)
                high = value(a, b, factor, unit * 32 + 16)
            quantise(low, high, quants + unit * (32 * C), side + unit * (20 * C), 4 * C)

    @helper
    def f32_column(filled, a, b, factor, tile, column, first, last, n):
        for unit in range(first, last):
            i = unit * 16
            count = min(16, n - i)
            v = s.splat(s.f32(0))
            if filled:
                v = value(a, b, factor, i) if count == 16 else value_part(a, b, factor, i, count)
            target = tile + (i * C + column) * 4
            if C == 1 and count == 16:
                s.store(target, v)
            else:
                s.scatter(target, v, 4 * C, count)

    @helper
    def split_column(filled, a, b, factor, tile, column, first, last, n):
        zero = s.splat(s.f32(0))
        for unit in range(first, last):
            low, high = zero, zero
            if filled:
                low = value(a, b, factor, unit * 32)
                high = value(a, b, factor, unit * 32 + 16)
            target = tile + unit * (192 * C) + column * 64
            split(low, target, 64 * C)
            split(high, target + 32, 64 * C)

    return {"int8": int8_column, "split": split_column, "f32": f32_column}[kind]


def layout(C, kind):
    """Helpers (n -> units of a tile), (n -> bytes of a tile), (at, last, units -> piece)."""
    unit, each = {"int8": (32, 52), "split": (32, 192), "f32": (1, 4)}[kind]
    bytes_per_unit = each * C

    @helper
    def units_of(n):
        return (n + 15) // 16 if kind == "f32" else n // 32

    @helper
    def tile_bytes(n):
        return (n // unit * bytes_per_unit + 63) // 64 * 64

    @helper
    def piece(at, last, units):
        tile = at // units
        first = at - tile * units
        return tile, first, min(units, first + last - at)

    return units_of, tile_bytes, piece


def build_pack(C, kind):
    column = column_packer(C, kind, _PLAIN)
    units_of, tile_bytes, piece = layout(C, kind)

    def pack(x, out, live, n, x_stride, thread, n_threads):
        rows, units, none = s.load_i64(live), units_of(n), s.splat(s.f32(0))
        at, last = share((rows + C - 1) // C * units, thread, n_threads)
        while at < last:
            tile, first, stop = piece(at, last, units)
            for c in range(C):
                row = tile * C + c
                source, target = x + row * x_stride * 4, out + tile * tile_bytes(n)
                column(row < rows, source, 0, none, target, c, first, stop, n)
            at += stop - first

    return pack


def build_rms_norm_pack(C, kind):
    column = column_packer(C, kind, _NORMED)
    units_of, tile_bytes, piece = layout(C, kind)

    def rms_norm_pack(x, w, out, live, n, x_stride, eps, thread, n_threads):
        rows, units, epsilon = s.load_i64(live), units_of(n), s.float_of(eps)
        at, last = share((rows + C - 1) // C * units, thread, n_threads)
        while at < last:
            tile, first, stop = piece(at, last, units)
            for c in range(C):
                row = tile * C + c
                source, target = x + row * x_stride * 4, out + tile * tile_bytes(n)
                factor = s.splat(s.f32(0))
                if row < rows:
                    factor = s.splat(inverse_rms(source, n, epsilon))
                column(row < rows, source, w, factor, target, c, first, stop, n)
            at += stop - first

    return rms_norm_pack


def build_swiglu_pack(C, kind):
    column = column_packer(C, kind, _GATED)
    units_of, tile_bytes, piece = layout(C, kind)

    def swiglu_pack(gate, up, out, live, n, gate_stride, up_stride, thread, n_threads):
        rows, units, none = s.load_i64(live), units_of(n), s.splat(s.f32(0))
        at, last = share((rows + C - 1) // C * units, thread, n_threads)
        while at < last:
            tile, first, stop = piece(at, last, units)
            for c in range(C):
                row = tile * C + c
                g, u = gate + row * gate_stride * 4, up + row * up_stride * 4
                column(row < rows, g, u, none, out + tile * tile_bytes(n), c, first, stop, n)
            at += stop - first

    return swiglu_pack


def build_pack_rows(C, kind):
    column = column_packer(C, kind, _PLAIN)
    units_of, tile_bytes, piece = layout(C, kind)

    def pack_rows(x, tiles, out, n_tiles, n, x_stride, divisor, thread, n_threads):
        units, none = units_of(n), s.splat(s.f32(0))
        at, last = share(s.load_i64(n_tiles) * units, thread, n_threads)
        while at < last:
            tile, first, stop = piece(at, last, units)
            for c in range(C):
                row = s.load_i32(tiles + (tile * (C + 1) + 1 + c) * 4)
                source, target = x + row // divisor * x_stride * 4, out + tile * tile_bytes(n)
                column(row >= 0, source, 0, none, target, c, first, stop, n)
            at += stop - first

    return pack_rows


def build_swiglu_pack_rows(C, kind):
    column = column_packer(C, kind, _GATED)
    units_of, tile_bytes, piece = layout(C, kind)

    def swiglu_pack_rows(
        gate, up, tiles, out, n_tiles, n, gate_stride, up_stride, thread, n_threads
    ):
        units, none = units_of(n), s.splat(s.f32(0))
        at, last = share(s.load_i64(n_tiles) * units, thread, n_threads)
        while at < last:
            tile, first, stop = piece(at, last, units)
            for c in range(C):
                row = s.load_i32(tiles + (tile * (C + 1) + 1 + c) * 4)
                g, u = gate + row * gate_stride * 4, up + row * up_stride * 4
                column(row >= 0, g, u, none, out + tile * tile_bytes(n), c, first, stop, n)
            at += stop - first

    return swiglu_pack_rows


KERNELS = {
    "pack": build_pack,
    "rms_norm_pack": build_rms_norm_pack,
    "swiglu_pack": build_swiglu_pack,
    "pack_rows": build_pack_rows,
    "swiglu_pack_rows": build_swiglu_pack_rows,
}
