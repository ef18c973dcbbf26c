"""Splits of attention joined, in their order, and what leaves the kernel.

A block that walks all splits of its tile joins each as it ends; where every split has a block, the
last to come joins them from memory, by the same function: the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

from runtime.backends.cuda.intrinsics import (
    divide,
    exp2,
    f32,
    fma,
    fmax,
    load2,
    load4,
    registers,
    shared,
    store,
    store2,
    store4,
    syncthreads,
    thread_x,
    u32,
)  # fmt: skip

from .attention_scores import ROWS, WARPS, finite, row_of
from .rotation import rotating

THREADS = 32 * WARPS


def join(values, acc, size, low, high, low_part, high_part):
    """values and the (peak, sum) of rows g and g + 8 with a split's acc and theirs."""
    low_peak = fmax(low[0], low_part[0])
    high_peak = fmax(high[0], high_part[0])
    low_old, low_new = exp2(low[0] - finite(low_peak)), exp2(low_part[0] - finite(low_peak))
    high_old, high_new = exp2(high[0] - finite(high_peak)), exp2(high_part[0] - finite(high_peak))
    for n in range(size):
        old, new = (high_old, high_new) if n & 2 else (low_old, low_new)
        values[n] = fma(acc[n], new, values[n] * old)
    low_sum = fma(low_part[1], low_new, low[1] * low_old)
    high_sum = fma(high_part[1], high_new, high[1] * high_old)
    return (low_peak, low_sum), (high_peak, high_sum)


def keep(acc, size, low, high, partial, stats, cell):
    """A split's part to memory: partial f32 [cell, n, thread, 4], stats [cell, 16, 2]."""
    for n in range(size // 4):
        at = u32(u32(u32(cell * (size // 4)) + n) * THREADS + thread_x())
        store4(partial, at, acc[4 * n], acc[4 * n + 1], acc[4 * n + 2], acc[4 * n + 3])
    if thread_x() < 32 and thread_x() & 3 == 0:
        row = u32(u32(ROWS * cell) + (thread_x() >> 2))
        store2(stats, row, low[0], low[1])
        store2(stats, u32(row + 8), high[0], high[1])


def fetch(acc, size, partial, stats, cell):
    """The inverse of `keep`: (peak, sum) of rows g and g + 8."""
    for n in range(size // 4):
        at = u32(u32(u32(cell * (size // 4)) + n) * THREADS + thread_x())
        w = load4(partial, at)
        for i in range(4):
            acc[4 * n + i] = w[i]
    row = u32(u32(ROWS * cell) + ((thread_x() & 31) >> 2))
    return load2(stats, row), load2(stats, u32(row + 8))


def finisher(slots: int) -> Callable:
    """A function: the joined values of a tile, rotated back where `rotation` is not 0, to out."""
    dims = 128 * slots
    room, held = shared("f32", ROWS * dims), registers("f32", dims // 32)
    rotate = rotating(4 * slots)

    def finish(values, low, high, out, tile, part, kv_head, group, out_stride, dim, rotation):
        rows, heads = room(), held()
        warp, lane = u32(thread_x() >> 5), u32(thread_x() & 31)
        low_factor, high_factor = divide(f32(1), low[1]), divide(f32(1), high[1])
        for n in range(16 * slots):
            d = u32(128 * (n // 16) + 32 * warp + 8 * (n % 16 // 4) + 2 * (lane & 3) + (n & 1))
            row = u32((lane >> 2) + 8 * ((n >> 1) & 1))
            rows[u32(row * dims + d)] = values[n] * (high_factor if n & 2 else low_factor)
        syncthreads()
        row = warp
        while row < ROWS:
            token, head, live = row_of(row, tile, part, group)
            for k in range(4 * slots):
                heads[k] = rows[u32(row * dims + 32 * k + lane)]
            if rotation != 0:
                rotate(heads, dim, rotation)
            target = u32(u32(token * out_stride) + u32(u32(kv_head * group + head) * dim) + lane)
            for k in range(4 * slots):
                if live and u32(32 * k + lane) < dim:
                    store(out, u32(target + 32 * k), heads[k])
            row = u32(row + WARPS)

    return finish
