"""How one column of packed activations is made: values from their sources, then one layout.

A source is a pair of helpers (x, i) -> 16 values from element i on, (x, i, n) -> the first n < 16
of them, zeros after; x is a tuple of addresses and factors that only the source understands.
"""

from __future__ import annotations

from . import emit as e
from . import simd as s
from .quantise import quantise, quantise_four
from .rows import clamped_swiglu, helper


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
def plain(x, i):
    """x = (source): as it is."""
    return s.load(x[0] + i * 4)


@helper
def plain_part(x, i, n):
    """`plain` at a row's end."""
    return s.load_part(x[0] + i * 4, n, s.f32(0))


@helper
def normed(x, i):
    """x = (source, weights or 0, factor): source * factor * weights."""
    value = s.load(x[0] + i * 4) * s.splat(x[2])
    if x[1] != 0:
        value = value * s.load(x[1] + i * 4)
    return value


@helper
def normed_part(x, i, n):
    """`normed` at a row's end."""
    value = s.load_part(x[0] + i * 4, n, s.f32(0)) * s.splat(x[2])
    if x[1] != 0:
        value = value * s.load_part(x[1] + i * 4, n, s.f32(0))
    return value


@helper
def swiglu(x, i):
    """x = (gate, up, ..): silu(gate) * up."""
    return s.silu(s.load(x[0] + i * 4)) * s.load(x[1] + i * 4)


@helper
def swiglu_part(x, i, n):
    """`swiglu` at a row's end."""
    return s.silu(s.load_part(x[0] + i * 4, n, s.f32(0))) * s.load_part(x[1] + i * 4, n, s.f32(0))


@helper
def clamped(x, i):
    """x = (gate, up, alpha, limit): see `clamped_swiglu`."""
    gate, up = s.load(x[0] + i * 4), s.load(x[1] + i * 4)
    return clamped_swiglu(gate, up, s.splat(x[2]), s.splat(x[3]))


@helper
def clamped_part(x, i, n):
    """`clamped` at a row's end."""
    gate = s.load_part(x[0] + i * 4, n, s.f32(0))
    up = s.load_part(x[1] + i * 4, n, s.f32(0))
    return clamped_swiglu(gate, up, s.splat(x[2]), s.splat(x[3]))


@helper
def opened(x, i):
    """x = (source, gate): source * sigmoid(gate)."""
    return s.load(x[0] + i * 4) * s.sigmoid(s.load(x[1] + i * 4))


@helper
def gated_norm(x, i):
    """x = (source, weights, gate, factor): source * factor * weights * silu(gate)."""
    value = s.load(x[0] + i * 4) * s.splat(x[3]) * s.load(x[1] + i * 4)
    return value * s.silu(s.load(x[2] + i * 4))


@helper
def no_part(x, i, n):
    """For rows without an end: never called, but compiled."""
    return s.splat(s.f32(0))


PLAIN, NORMED = (plain, plain_part), (normed, normed_part)
SWIGLU = {"silu": (swiglu, swiglu_part), "oai": (clamped, clamped_part)}
# Heads are whole units: nothing is ever left over.
OPENED, GATED_NORM = (opened, no_part), (gated_norm, no_part)


def column_packer(C, coding, source):
    """(filled, x, tile, column, first, last, n): units first..last-1 of one column."""
    value, value_part = source

    @helper
    def int8_column(filled, x, tile, column, first, last, n):
        quants = tile + column * 32
        side = tile + n * C + column * 4
        zero, unit = s.splat(s.f32(0)), first
        while filled and unit + 4 <= last:
            i = unit * 32
            quantise_four(
                value(x, i), value(x, i + 16), value(x, i + 32), value(x, i + 48),
                value(x, i + 64), value(x, i + 80), value(x, i + 96), value(x, i + 112),
                quants + unit * (32 * C), side + unit * (20 * C), 4 * C,
            )  # fmt: skip
            unit += 4
        while unit < last:
            low, high = zero, zero
            if filled:
                low = value(x, unit * 32)
                high = value(x, unit * 32 + 16)
            quantise(low, high, quants + unit * (32 * C), side + unit * (20 * C), 4 * C)
            unit += 1

    @helper
    def f32_column(filled, x, tile, column, first, last, n):
        for unit in range(first, last):
            i = unit * 16
            count = min(16, n - i)
            v = s.splat(s.f32(0))
            if filled:
                v = value(x, i) if count == 16 else value_part(x, i, count)
            target = tile + (i * C + column) * 4
            if C == 1 and count == 16:
                s.store(target, v)
            else:
                s.scatter(target, v, 4 * C, count)

    @helper
    def split_column(filled, x, tile, column, first, last, n):
        zero = s.splat(s.f32(0))
        for unit in range(first, last):
            low, high = zero, zero
            if filled:
                low = value(x, unit * 32)
                high = value(x, unit * 32 + 16)
            target = tile + unit * (192 * C) + column * 64
            split(low, target, 64 * C)
            split(high, target + 32, 64 * C)

    return {"int8": int8_column, "split": split_column, "f32": f32_column}[coding]


UNITS = {"int8": 32, "split": 32, "f32": 16}  # values of a unit of work


def layout(C, coding):
    """Helpers (n -> units of a tile), (n -> bytes of a tile)."""
    unit, each = {"int8": (32, 52), "split": (32, 192), "f32": (1, 4)}[coding]
    bytes_per_unit = each * C

    @helper
    def units_of(n):
        return (n + 15) // 16 if coding == "f32" else n // 32

    @helper
    def tile_bytes(n):
        return (n // unit * bytes_per_unit + 63) // 64 * 64

    return units_of, tile_bytes
