"""What comes behind the products of experts: biases, and the weighted sum; a thread an element."""

from __future__ import annotations

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    block_y,
    entry,
    f32,
    fma,
    launch_next,
    launch_wait,
    load,
    store,
    thread_x,
    u32,
)  # fmt: skip

from .elementwise import sigmoid
from .norm_tail import ARGUMENTS, norm_tail

THREADS = 128


def build_expert_bias() -> Declared:
    """out[row] = y[row] + bias[ids[row]], ids below 0 with any: `count` elements in rows of n.

    Rows of y lie `y_stride` apart. Grid (count / 128).
    """

    @entry("y:f32* bias:f32* ids:i32* out:f32* n:u32 count:u32 y_stride:u32", threads=THREADS)
    def expert_bias(y, bias, ids, out, n, count, y_stride):
        launch_next()
        at = u32(block_x() * THREADS + thread_x())
        row = u32(at // n)
        launch_wait()
        if at < count:
            i, expert = u32(at - u32(row * n)), max(load(ids, row), 0)
            own = load(bias, u32(u32(expert) * n + i))
            store(out, at, load(y, u32(row * y_stride + i)) + own)

    return expert_bias


def build_expert_sum() -> Declared:
    """out f32 [rows, n]: sum over j < k of weights[row, j] * y[row, j], in the order of j.

    Then `shared` times the sigmoid of its `gate`, then `add`, where has_... says so: rows that lie
    so far apart. Where has_ids the experts of ids below 0 are left out. A single row may be normed
    at the end, see norm_tail.py. Grid (n / 128, rows).
    """
    tail = norm_tail(THREADS // 32)

    @entry(
        "y:f32* weights:f32* ids:i32* shared:f32* gate:f32* add:f32* out:f32* n:u32 k:u32 "
        "shared_stride:u32 gate_stride:u32 add_stride:u32 has_ids:u32 has_shared:u32 has_gate:u32 "
        "has_add:u32 " + ARGUMENTS,
        threads=THREADS,
    )
    def expert_sum(
        y, weights, ids, shared, gate, add, out, n, k, shared_stride, gate_stride, add_stride,
        has_ids, has_shared, has_gate, has_add, norm_x, norm_w, normed, norm_packed, tickets,
        norm_n, norm_eps, norm_stretches, norm_length, norm_to,
    ):  # fmt: skip
        launch_next()
        i, row = u32(block_x() * THREADS + thread_x()), block_y()
        launch_wait()
        if i < n:
            total, first = f32(0), u32(row * k)
            j = u32(0)
            while j < k:
                at = u32(first + j)
                if has_ids == 0 or load(ids, at) >= 0:
                    total = fma(load(y, u32(at * n + i)), load(weights, at), total)
                j = u32(j + 1)
            if has_shared:
                opening = f32(1)
                if has_gate:
                    opening = sigmoid(load(gate, u32(row * gate_stride)))
                total = fma(load(shared, u32(row * shared_stride + i)), opening, total)
            if has_add:
                total += load(add, u32(row * add_stride + i))
            store(out, u32(row * n + i), total)
        tail(
            norm_x, norm_w, normed, norm_packed, tickets, norm_n, norm_eps,
            norm_stretches, norm_length, norm_to,
        )  # fmt: skip

    return expert_sum
