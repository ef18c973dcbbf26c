"""Splits of attention joined, in their order, and what leaves the kernel.

A block that walks all splits of its tile joins each as it ends; where every split has a block, the
last to come joins them from memory, by the same function: the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

from runtime.backends.cuda.intrinsic import Intrinsic
from runtime.backends.cuda.intrinsics import (
    divide,
    exp2,
    f32,
    fma,
    fmax,
    load2,
    load4,
    registers,
    shared_load4,
    store,
    store2,
    store4,
    syncthreads,
    syncwarp,
    thread_x,
    u32,
)  # fmt: skip

from .attention_scores import ROWS, WARPS, finite, row_of
from .norm_gate import pack_rest, sigmoid_times
from .pack import pack_values
from .rotation import rotating

THREADS = 32 * WARPS


def held_at(n):
    """Where a thread's n-th joined value is in the block's room: registers are for the walk."""
    return u32(THREADS * n + thread_x())


def join(held, acc, size, low, high, low_part, high_part):
    """What is held and the (peak, sum) of rows g and g + 8 with a split's acc and theirs."""
    low_peak = fmax(low[0], low_part[0])
    high_peak = fmax(high[0], high_part[0])
    low_old, low_new = exp2(low[0] - finite(low_peak)), exp2(low_part[0] - finite(low_peak))
    high_old, high_new = exp2(high[0] - finite(high_peak)), exp2(high_part[0] - finite(high_peak))
    for n in range(size):
        old, new = (high_old, high_new) if n & 2 else (low_old, low_new)
        held[held_at(n)] = fma(acc[n], new, held[held_at(n)] * old)
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


def packer(slots: int) -> Callable:
    """A function: a row of heads in shared memory, gated where `has_gate`, to packed activations.

    n: values of a column. By a warp; the row of the first head of all ends the column.
    """
    dims = 128 * slots

    def pack(
        rows, row, gate, packed, token, head, live, dim, n, gate_stride, gate_head_stride,
        has_gate, stretches, length,
    ):  # fmt: skip
        lane = u32(thread_x() & 31)
        for i in range(slots):
            d = u32(128 * i + 4 * lane)
            there = live and d < dim
            v = shared_load4(rows, u32(u32(row * dims + d) >> 2))
            if has_gate and there:
                at = u32(u32(token * gate_stride) + u32(head * gate_head_stride) + d)
                v = sigmoid_times(load4(gate, u32(at >> 2)), v)
            place = u32(u32(head * dim + d) >> 2)
            pack_values(v, packed, token, place, stretches, length, there)
        if live and head == 0:
            pack_rest(packed, token, u32(n >> 5), stretches, length, lane)

    return pack


def finisher(slots: int, room: Intrinsic) -> Callable:
    """A function: the values of a tile that `room` holds, rotated back where `rotation` is not 0.

    To out, or where `stretches` is not 0 gated and packed.
    """
    dims = 128 * slots
    head_room = registers("f32", dims // 32)
    rotate, pack = rotating(4 * slots), packer(slots)

    def finish(
        acc, low, high, out, gate, packed, tile, part, kv_head, group, out_stride, dim, rotation,
        gate_stride, gate_head_stride, has_gate, stretches, length,
    ):  # fmt: skip
        rows, heads = room(), head_room()
        warp, lane = u32(thread_x() >> 5), u32(thread_x() & 31)
        low_factor, high_factor = divide(f32(1), low[1]), divide(f32(1), high[1])
        for n in range(16 * slots):
            acc[n] = rows[held_at(n)] * (high_factor if n & 2 else low_factor)
        syncthreads()
        for n in range(16 * slots):
            d = u32(128 * (n // 16) + 32 * warp + 8 * (n % 16 // 4) + 2 * (lane & 3) + (n & 1))
            row = u32((lane >> 2) + 8 * ((n >> 1) & 1))
            rows[u32(row * dims + d)] = acc[n]
        syncthreads()
        row = warp
        while row < ROWS:
            token, head, live = row_of(row, tile, part, group)
            head = u32(kv_head * group + head)
            first = u32(row * dims + lane)
            for k in range(4 * slots):
                heads[k] = rows[u32(first + 32 * k)]
            if rotation != 0:
                rotate(heads, dim, rotation)
                for k in range(4 * slots):
                    rows[u32(first + 32 * k)] = heads[k]
            if stretches != 0:
                syncwarp()
                pack(
                    rows, row, gate, packed, token, head, live, dim, out_stride, gate_stride,
                    gate_head_stride, has_gate, stretches, length,
                )  # fmt: skip
            else:
                target = u32(u32(token * out_stride) + u32(head * dim) + lane)
                for k in range(4 * slots):
                    if live and u32(32 * k + lane) < dim:
                        store(out, u32(target + 32 * k), heads[k])
            row = u32(row + WARPS)

    return finish
