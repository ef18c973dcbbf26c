"""What several kernels do with a row of float32: divide work, sum squares, find the norm."""

from __future__ import annotations

from llvmlite import ir
from numba import njit
from numba.core import cgutils

from runtime.backends.cpu.abi import SHARE_UNIT

from . import emit as e
from . import simd as s

# Inlined by Numba itself, before typing: three times cheaper to compile than a call.
helper = njit(nogil=True, error_model="numpy", boundscheck=False, inline="always")


@helper
def share(n, thread, n_threads):
    """The contiguous range of `n` items that belongs to a thread."""
    return n * thread // n_threads, n * (thread + 1) // n_threads


@helper
def piece(at, last, units):
    """How far units at..last-1 of many rows (or tiles) reach in the first: row, first, last + 1."""
    row = at // units
    first = at - row * units
    return row, first, min(units, first + last - at)


@helper
def share_of_row(n, thread, n_threads):
    """Elements first..end-1 of rows of n that belong to a thread: see Share in plan.py."""
    first, end = share((n + SHARE_UNIT - 1) // SHARE_UNIT, thread, n_threads)
    return first * SHARE_UNIT, min(end * SHARE_UNIT, n)


@helper
def clear(address, nbytes):
    """Zeros in `nbytes`, rounded up to 64."""
    for i in range(0, nbytes, 64):
        s.store(address + i, s.splat(s.f32(0)))


@helper
def ask_for(address, nbytes):
    """Fetch what will be read soon into the cache."""
    for i in range(0, nbytes, 64):
        s.prefetch(address + i)


@s.operation(s.f32, s.i64, s.i64)
def sum_squares(b, x, n):
    """Sum of n squares: four running sums of 16 lanes, then of one, joined in a fixed order."""
    zero = e.floats(0.0)
    sums = [cgutils.alloca_once_value(b, zero) for _ in range(4)]

    def add(slot, value):
        b.store(e.fma(b, value, value, b.load(slot), s.FUSED), slot)

    def address(i):
        return b.add(x, b.shl(i, ir.Constant(e.i64, 2)))

    def loop(start, stop, step, body):
        count = ir.Constant(e.i64, step)
        with cgutils.for_range_slice(b, start, stop, count, e.i64) as (i, _):
            body(address(i))

    def four(at):
        for j, slot in enumerate(sums):
            add(slot, e.load(b, e.offset(b, at, 64 * j), e.wide(e.f32), 4))

    large, small = (b.and_(n, ir.Constant(e.i64, -step)) for step in (64, 16))
    loop(ir.Constant(e.i64, 0), large, 64, four)
    loop(large, small, 16, lambda at: add(sums[0], e.load(b, at, e.wide(e.f32), 4)))
    first = ir.Constant(e.i32, 0)

    def one(at):
        value = b.insert_element(zero, e.load(b, at, e.f32, 4), first)
        add(sums[1], value)

    loop(small, n, 1, one)
    a, c, d, f = (b.load(slot) for slot in sums)
    return e.total(b, b.fadd(b.fadd(a, c), b.fadd(d, f)))


@helper
def inverse_rms(x, n, eps):
    """1 / sqrt(mean(x^2) + eps) of n floats at an address."""
    return s.f32(1) / s.sqrt_f32(sum_squares(x, n) / s.f32(n) + eps)


@helper
def clamped_swiglu(gate, up, alpha, limit):
    """(up + 1) * gate * sigmoid(alpha * gate); gate at most limit, up within [-limit, limit]."""
    gate = s.smaller(limit, gate)
    up = s.larger(s.splat(s.f32(0)) - limit, s.smaller(limit, up))
    return (up + s.splat(s.f32(1))) * (gate * s.sigmoid(gate * alpha))
