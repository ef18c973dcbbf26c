"""Walsh-Hadamard transforms of heads (Fino and Algazi 1976): parallel over (token x head).

log2(n) rounds of sums and differences: those of dims less than 16 apart inside a vector, the
others between vectors. Attention and the cache writes transform the heads that they have at hand
by the same function, so that fused and plain have the same bits.
"""

from __future__ import annotations

from llvmlite import ir

from runtime.ops.kv_formats import kv_format

from . import emit as e
from . import simd as s
from .rows import helper, share


def _round(apart):
    """Sums and differences of lanes `apart`; the sum goes to the lower one."""
    other = ir.Constant(e.wide(e.i32), [lane ^ apart for lane in range(e.LANES)])
    signs = ir.Constant(e.wide(e.f32), [-1.0 if lane & apart else 1.0 for lane in range(e.LANES)])

    def emit(b, x):
        return e.fma(b, x, signs, b.shuffle_vector(x, x, other), s.FUSED)

    return emit


_ROUNDS = [_round(apart) for apart in (1, 2, 4, 8)]
by_1, by_2, by_4, _ = (s.operation(s.f32x16, s.f32x16)(each) for each in _ROUNDS)


@s.operation(s.f32x16, s.f32x16)
def within(b, x):
    """All rounds inside a vector."""
    for each in _ROUNDS:
        x = each(b, x)
    return x


@helper
def transform(x, n):
    """The n floats at an address, n a power of two."""
    factor = s.splat(s.f32(1) / s.sqrt_f32(s.f32(n)))
    if n < 16:
        value = s.load_part(x, n, s.f32(0))
        if n > 1:
            value = by_1(value)
        if n > 2:
            value = by_2(value)
        if n > 4:
            value = by_4(value)
        s.store_part(x, value * factor, n)
    else:
        apart = 64
        if n < 64:
            for i in range(0, n * 4, 64):
                s.store(x + i, within(s.load(x + i)) * factor)
        else:
            for i in range(x, x + n * 4, 256):
                a, b = within(s.load(i)) * factor, within(s.load(i + 64)) * factor
                c, d = within(s.load(i + 128)) * factor, within(s.load(i + 192)) * factor
                a, b, c, d = a + b, a - b, c + d, c - d
                s.store(i, a + c)
                s.store(i + 64, b + d)
                s.store(i + 128, a - c)
                s.store(i + 192, b - d)
            apart = 256
        while apart < n * 4:
            for start in range(x, x + n * 4, 2 * apart):
                for i in range(start, start + apart, 64):
                    low, high = s.load(i), s.load(i + apart)
                    s.store(i, low + high)
                    s.store(i + apart, low - high)
            apart *= 2


@helper
def rotate(x, d, block):
    """A head of d dims in place, as `ops.hadamard` says; block 0: it stays as it is."""
    at, size = 0, block
    while size > 0 and at < d:
        while size > d - at:
            size //= 2
        transform(x + at * 4, size)
        at += size


@helper
def unrotated(x, d, block):
    """Nothing: kernels for caches that are never rotated have no transform."""


def rotating(type):
    """`rotate` for a cache type that may be rotated, one whose dims share scales."""
    return rotate if kv_format(type).shared else unrotated


def build_hadamard():
    """Heads copied and rotated: parallel over (token x head)."""

    def hadamard(
        x, out, live, n_heads, head_dim, x_stride, x_head_stride, block, thread, n_threads
    ):
        first, last = share(s.load_i64(live) * n_heads, thread, n_threads)
        for item in range(first, last):
            row, head = item // n_heads, item % n_heads
            source, target = (
                x + (row * x_stride + head * x_head_stride) * 4,
                out + item * head_dim * 4,
            )
            for i in range(0, head_dim - 15, 16):
                s.store(target + i * 4, s.load(source + i * 4))
            for i in range(head_dim // 16 * 16, head_dim):
                s.store_f32(target + i * 4, s.load_f32(source + i * 4))
            rotate(target, head_dim, block)

    return hadamard
