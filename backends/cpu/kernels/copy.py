"""Copies of views: elements of any two or four bytes that lie anywhere, one after another.

Parallel over rows of n elements; `shape` of the rows is [live, b, c], each axis with a stride.
"""

from __future__ import annotations

from runtime.backends.plan.catalogue import constants

from . import simd as s
from .rows import helper, share


@constants(item=(2, 4))
def build_copy(item):
    """A view's elements in order."""
    size = item  # a number of the closure, whatever the name of the constant
    load, store = (s.load_u16, s.store_i16) if item == 2 else (s.load_i32, s.store_i32)

    @helper
    def apart(x, step, out, n):
        for i in range(n):
            store(out + i * size, load(x + i * step * size))

    @helper
    def together(x, out, n):
        """Rows without gaps, sixteen elements of four bytes at a time: bits are kept."""
        whole = n // 16 * 16
        for i in range(0, whole, 16):
            s.store(out + i * 4, s.load(x + i * 4))
        apart(x + whole * 4, 1, out + whole * 4, n - whole)

    def copy(x, out, live, b, c, n, stride_a, stride_b, stride_c, stride_n, thread, n_threads):
        first, last = share(s.load_i64(live) * b * c, thread, n_threads)
        for row in range(first, last):
            i = row // (b * c)
            j = row // c - i * b
            k = row - (i * b + j) * c
            source = x + (i * stride_a + j * stride_b + k * stride_c) * size
            if size == 4 and stride_n == 1:
                together(source, out + row * n * 4, n)
            else:
                apart(source, stride_n, out + row * n * size, n)

    return copy
