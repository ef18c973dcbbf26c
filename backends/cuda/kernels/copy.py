"""Copies of views: elements of two or four bytes that lie anywhere, one after another."""

from __future__ import annotations

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    entry,
    launch_next,
    launch_wait,
    load,
    store,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.plan.catalogue import constants

THREADS = 128


@constants(item=(2, 4))
def build_copy(item: int) -> Declared:
    """The `count` elements of a view [*, b, c, n], each axis with a stride. Grid (count / 128)."""
    kind = "u16" if item == 2 else "u32"

    @entry(
        f"x:{kind}* out:{kind}* count:u32 b:u32 c:u32 n:u32 stride_a:u32 stride_b:u32 stride_c:u32 "
        "stride_n:u32",
        threads=THREADS,
    )
    def copy(x, out, count, b, c, n, stride_a, stride_b, stride_c, stride_n):
        launch_next()
        at = u32(block_x() * THREADS + thread_x())
        row = u32(at // n)
        plane = u32(row // c)
        first = u32(plane // b)
        source = u32(first * stride_a + u32(plane - u32(first * b)) * stride_b)
        source = u32(source + u32(row - u32(plane * c)) * stride_c)
        source = u32(source + u32(at - u32(row * n)) * stride_n)
        launch_wait()
        if at < count:
            store(out, at, load(x, source))

    return copy
