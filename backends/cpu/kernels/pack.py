"""Activations packed for the matmul tiles, with the op before the matmul fused in.

A tile is C consecutive rows (the matmul's columns). Coded "f32": [n][C] float32. "int8": n/32
blocks [C][32] int8, then n/32 blocks of side data [5][C] of four bytes each:
    d (f32 scale) | d * sum(q) (f32) | -8 * sum(q) | -8 * sum(q[:16]) | -8 * sum(q[16:])   (int32)
with q = x / d to the nearest even and d near max|x| / 127 such that the squared error is small (see
`quantise`); a block below 1e-30 counts as zero.
The last three let a tile start its integer dot product from the correction for unsigned weights.
"split": n/32 blocks [3][C][32] bfloat16, three pieces that add up to the float32 value: each
is the leading eight bits of what is left.

Parallel over (tile x units of 32 or 16 elements), so one row keeps every thread busy; swiglu_pack
over units alone, of all tiles alike, so that a thread packs what its own matmul rows gave. Each
thread computes a row's norm for itself, in the same order. Columns without a row are zeros.
"""

from __future__ import annotations

from runtime.backends.cpu.tile.spec import COLUMNS
from runtime.backends.plan.catalogue import constants

from . import simd as s
from .pack_columns import (
    GATED_NORM,
    NORMED,
    OPENED,
    PLAIN,
    SWIGLU,
    UNITS,
    column_packer,
    layout,
)
from .rows import inverse_rms, piece, share, share_of_row


@constants(C=COLUMNS, coding=tuple(UNITS))
def build_pack(C, coding):
    """Rows as they are, packed."""
    column = column_packer(C, coding, PLAIN)
    units_of, tile_bytes = layout(C, coding)

    def pack(x, out, live, n, x_stride, thread, n_threads):
        rows, units = s.load_i64(live), units_of(n)
        at, last = share((rows + C - 1) // C * units, thread, n_threads)
        while at < last:
            tile, first, stop = piece(at, last, units)
            for c in range(C):
                row = tile * C + c
                source, target = x + row * x_stride * 4, out + tile * tile_bytes(n)
                column(row < rows, (source,), target, c, first, stop, n)
            at += stop - first

    return pack


@constants(C=COLUMNS, coding=tuple(UNITS))
def build_rms_norm_pack(C, coding):
    """rms_norm(x) * w, packed."""
    column = column_packer(C, coding, NORMED)
    units_of, tile_bytes = layout(C, coding)

    def rms_norm_pack(x, w, out, live, n, x_stride, eps, thread, n_threads):
        rows, units, epsilon = s.load_i64(live), units_of(n), s.float_of(eps)
        at, last = share((rows + C - 1) // C * units, thread, n_threads)
        while at < last:
            tile, first, stop = piece(at, last, units)
            for c in range(C):
                row = tile * C + c
                source, target = x + row * x_stride * 4, out + tile * tile_bytes(n)
                factor = s.f32(0)
                if row < rows:
                    factor = inverse_rms(source, n, epsilon)
                column(row < rows, (source, w, factor), target, c, first, stop, n)
            at += stop - first

    return rms_norm_pack


@constants(C=COLUMNS, coding=tuple(UNITS), act=tuple(SWIGLU))
def build_swiglu_pack(C, coding, act):
    """SwiGLU of gate and up ("oai": gpt-oss's), packed."""
    column = column_packer(C, coding, SWIGLU[act])
    _, tile_bytes = layout(C, coding)
    unit = UNITS[coding]

    def swiglu_pack(
        gate, up, out, live, n, gate_stride, up_stride, alpha, limit, thread, n_threads
    ):
        rows, slope, bound = s.load_i64(live), s.float_of(alpha), s.float_of(limit)
        first, last = share_of_row(n, thread, n_threads)
        for tile in range((rows + C - 1) // C):
            for c in range(C):
                row = tile * C + c
                g, u = gate + row * gate_stride * 4, up + row * up_stride * 4
                target, stop = out + tile * tile_bytes(n), (last + unit - 1) // unit
                column(row < rows, (g, u, slope, bound), target, c, first // unit, stop, n)

    return swiglu_pack


@constants(C=COLUMNS, coding=tuple(UNITS))
def build_pack_rows(C, coding):
    """The rows that tiles of experts list, row // `divisor` of x, packed; -1 lists no row."""
    column = column_packer(C, coding, PLAIN)
    units_of, tile_bytes = layout(C, coding)

    def pack_rows(x, tiles, out, n_tiles, n, x_stride, divisor, thread, n_threads):
        units = units_of(n)
        at, last = share(s.load_i64(n_tiles) * units, thread, n_threads)
        while at < last:
            tile, first, stop = piece(at, last, units)
            for c in range(C):
                row = s.load_i32(tiles + (tile * (C + 1) + 1 + c) * 4)
                source, target = x + row // divisor * x_stride * 4, out + tile * tile_bytes(n)
                column(row >= 0, (source,), target, c, first, stop, n)
            at += stop - first

    return pack_rows


@constants(C=COLUMNS, coding=tuple(UNITS), act=tuple(SWIGLU))
def build_swiglu_pack_rows(C, coding, act):
    """SwiGLU of the rows that tiles of experts list, packed; -1 lists no row."""
    column = column_packer(C, coding, SWIGLU[act])
    units_of, tile_bytes = layout(C, coding)

    def swiglu_pack_rows(
        gate, up, tiles, out, n_tiles, n, gate_stride, up_stride, alpha, limit, thread, n_threads
    ):
        units, slope, bound = units_of(n), s.float_of(alpha), s.float_of(limit)
        at, last = share(s.load_i64(n_tiles) * units, thread, n_threads)
        while at < last:
            tile, first, stop = piece(at, last, units)
            for c in range(C):
                row = s.load_i32(tiles + (tile * (C + 1) + 1 + c) * 4)
                g, u = gate + row * gate_stride * 4, up + row * up_stride * 4
                target = out + tile * tile_bytes(n)
                column(row >= 0, (g, u, slope, bound), target, c, first, stop, n)
            at += stop - first

    return swiglu_pack_rows


@constants(C=COLUMNS, coding=tuple(UNITS))
def build_sigmoid_gate_pack(C, coding):
    """x * sigmoid(gate), heads of the gate `gate_head_stride` apart, packed."""
    column = column_packer(C, coding, OPENED)
    units_of, tile_bytes = layout(C, coding)
    unit = UNITS[coding]

    def sigmoid_gate_pack(
        x, gate, out, live, n, head_dim, x_stride, gate_stride, gate_head_stride, thread, n_threads
    ):
        rows, units, gap = s.load_i64(live), units_of(n), gate_head_stride - head_dim
        at, last = share((rows + C - 1) // C * units, thread, n_threads)
        while at < last:
            tile, first, stop = piece(at, last, units)
            for c in range(C):
                row = tile * C + c
                source, target = x + row * x_stride * 4, out + tile * tile_bytes(n)
                begin = first
                while begin < stop:
                    head = begin * unit // head_dim
                    end = min(stop, (head + 1) * head_dim // unit)
                    g = gate + (row * gate_stride + head * gap) * 4
                    column(row < rows, (source, g), target, c, begin, end, n)
                    begin = end
            at += stop - first

    return sigmoid_gate_pack


@constants(C=COLUMNS, coding=tuple(UNITS))
def build_gated_norm_pack(C, coding):
    """rms_norm of each head times w times silu(gate), packed."""
    column = column_packer(C, coding, GATED_NORM)
    units_of, tile_bytes = layout(C, coding)
    unit = UNITS[coding]

    def gated_norm_pack(
        x, w, gate, out, live, n, head_dim, x_stride, gate_stride, gate_head_stride, eps, thread,
        n_threads,
    ):  # fmt: skip
        rows, units, gap = s.load_i64(live), units_of(n), gate_head_stride - head_dim
        at, last = share((rows + C - 1) // C * units, thread, n_threads)
        while at < last:
            tile, first, stop = piece(at, last, units)
            for c in range(C):
                row = tile * C + c
                source, target = x + row * x_stride * 4, out + tile * tile_bytes(n)
                begin = first
                while begin < stop:
                    head = begin * unit // head_dim
                    end = min(stop, (head + 1) * head_dim // unit)
                    g = gate + (row * gate_stride + head * gap) * 4
                    factor = s.f32(0)
                    if row < rows:
                        start = source + head * head_dim * 4
                        factor = inverse_rms(start, head_dim, s.float_of(eps))
                    weights = w - head * head_dim * 4
                    parts = (source, weights, g, factor)
                    column(row < rows, parts, target, c, begin, end, n)
                    begin = end
            at += stop - first

    return gated_norm_pack
