"""Products of few tokens with the experts they chose: each choice is a column of its own.

Two launches are a network of experts: gate and up, gated and packed (`expert_pair`), then down,
summed over a token's choices with what is added to the sum (`expert_total`). Rows are shared by
the lanes of a warp as in `matvec.py`, and their sums are the canonical ones of `layouts.py`.
"""

from __future__ import annotations

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    block_y,
    entry,
    f32,
    fma,
    i32,
    launch_next,
    launch_wait,
    load,
    pick,
    registers,
    shared,
    store,
    syncthreads,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.plan.catalogue import constants

from .elementwise import clamped, gated, sigmoid
from .experts_rows import MOST_ROWS, SECOND, THREADS, WARPS, warp_rows, warp_rows_of_floats
from .formats import FORMATS
from .matvec import rows_of
from .norm_tail import ARGUMENTS, norm_tail
from .pack import pack_values

INNER = SECOND  # rows of a network's inside that a block of threads takes


@constants(format=tuple(FORMATS))
def build_expert_pair(format: str) -> Declared:
    """out[choice] = silu(gate x + bias) * (up x + bias), or its clamped form, packed.

    `gate` and `up`: `rows` rows of each expert, one expert after another; biases alike. `x`:
    columns, each of `every` choices; ids i32 [live], below 0 where an expert is elsewhere: then
    nothing is written. Of `ranks` results of a token `k` are of its choices, and one more may be
    of a shared expert; with `opened` its product of a row of `floats` with `opener` is `opening`.
    Grid (places of a packed column, results).
    """
    sums, EACH = warp_rows(format, 2), rows_of(format, 1) // 2
    values, four_values = shared("f32", 2 * INNER), registers("f32", 4)
    dot, single = warp_rows_of_floats(), shared("f32", 1)

    @entry(
        "gate:u32* up:u32* x:u32* ids:i32* gate_bias:f32* up_bias:f32* shared_gate:u32* "
        "shared_up:u32* floats:f32* opener:u32* opening:f32* out:u32* live:u32* rows:u32 k:u32 "
        "ranks:u32 opened:u32 float_shift:u32 units:u32 every:u32 row_pieces:u32 high:u32 "
        "scales:u32 supers:u32 shift:u32 stretches:u32 pairs:u32 out_stretches:u32 "
        "out_length:u32 has_bias:u32 clamp:u32 alpha:f32 limit:f32",
        threads=THREADS,
    )
    def expert_pair(
        gate, up, x, ids, gate_bias, up_bias, shared_gate, shared_up, floats, opener, opening, out,
        live, rows, k, ranks, opened, float_shift, units, every, row_pieces, high, scales,
        supers, shift, stretches, pairs, out_stretches, out_length, has_bias, clamp, alpha, limit,
    ):  # fmt: skip
        launch_next()
        y, token, first = values(), u32(block_y() // ranks), u32(block_x() * INNER)
        rank = u32(block_y() - token * ranks)
        choice, joined = u32(token * k + rank), u32(rank == k)
        step = u32(u32(u32(32) >> shift) * EACH)
        launch_wait()
        if token >= load(live, 0):
            return
        expert = i32(0) if joined else load(ids, choice)
        if expert < 0:
            return
        own, source = u32(u32(expert) * rows), token if joined else u32(choice // every)
        column = u32(source * u32(5 * u32(stretches * pairs)))
        even = pick(joined, gate, shared_gate, gate, gate)
        odd = pick(joined, up, shared_up, up, up)
        rest = u32(min(u32(rows - first), u32(INNER))) if first < rows else u32(0)
        at = u32((thread_x() >> 5) * step)
        while at < rest:
            left = u32(min(u32(rest - at), step))
            row = u32(u32(own + first) + at)
            sums(
                y, at, even, odd, x, column, row, left, row_pieces, high, scales, supers, shift,
                stretches, pairs,
            )  # fmt: skip
            at = u32(at + WARPS * step)
        if joined and opened and block_x() == 0 and u32(thread_x() >> 5) == WARPS - 1:
            one = single()
            column = u32(token * u32(2 * units))
            dot(one, 0, opener, floats, column, u32(0), u32(1), u32(0), float_shift, units)
            if (thread_x() & 31) == 0:
                store(opening, token, one[0])
        syncthreads()
        if thread_x() < 32:
            four = four_values()
            lane = u32(thread_x())
            for n in range(4):
                i = u32(4 * u32(lane & 7) + n)
                four[n] = f32(0)
                if u32(first + i) < rows:
                    g, v = y[i], y[u32(INNER + i)]
                    if has_bias and not joined:
                        g += load(gate_bias, u32(u32(own + first) + i))
                        v += load(up_bias, u32(u32(own + first) + i))
                    four[n] = clamped(g, v, alpha, limit) if clamp else gated(g, v)
            i = u32(u32(8 * block_x()) + (lane & 7))
            packed = four[0], four[1], four[2], four[3]
            pack_values(packed, out, block_y(), i, out_stretches, out_length, lane < 8)

    return expert_pair


def opened(opening, token, stride, there):
    """What a shared expert counts."""
    open = f32(1)
    if there:
        open = sigmoid(load(opening, u32(token * stride)))
    return open


@constants(format=tuple(FORMATS))
def build_expert_total(format: str) -> Declared:
    """out[token, row] = sum over its k choices, in order, of share[choice] (w x + bias)[row].

    w: `rows` rows of each expert, one expert after another; biases alike. `x`: columns, each of
    `every` results; choices whose id is below 0 are left out. Of `ranks` columns of a token one
    more than its choices may be multiplied with `joined`, a shared expert, and counts the sigmoid
    of its `opening`. Then `addend` times the same, then `residual`, where has_... says so: rows
    that lie so far apart. Without shares a token is one choice, and its product alone is stored.
    A single row may be normed at the end, see norm_tail.py. Grid (rows / (rows of a warp at a
    time), tokens).
    """
    sums, ROWS = warp_rows(format), rows_of(format, 1)
    values = shared("f32", WARPS * MOST_ROWS)
    totals, tail = shared("f32", MOST_ROWS), norm_tail(WARPS)

    @entry(
        "weights:u32* joined:u32* x:u32* ids:i32* shares:f32* bias:f32* addend:f32* opening:f32* "
        "residual:f32* out:f32* live:u32* rows:u32 k:u32 ranks:u32 every:u32 row_pieces:u32 "
        "high:u32 scales:u32 supers:u32 shift:u32 stretches:u32 pairs:u32 addend_stride:u32 "
        "opening_stride:u32 residual_stride:u32 has_shares:u32 has_bias:u32 has_addend:u32 "
        "has_opening:u32 has_residual:u32 " + ARGUMENTS,
        threads=THREADS,
    )
    def expert_total(
        weights, joined, x, ids, shares, bias, addend, opening, residual, out, live, rows, k,
        ranks, every,
        row_pieces, high, scales, supers, shift, stretches, pairs, addend_stride, opening_stride,
        residual_stride, has_shares, has_bias, has_addend, has_opening, has_residual, norm_x,
        norm_w, normed, norm_packed, tickets, norm_n, norm_eps, norm_stretches,
        norm_length, norm_to,
    ):  # fmt: skip
        launch_next()
        y, total, token = values(), totals(), u32(block_y())
        step = u32(u32(u32(32) >> shift) * ROWS)
        first = u32(block_x() * step)
        left = u32(min(u32(rows - first), step))
        launch_wait()
        if token >= load(live, 0):
            return
        if thread_x() < left:
            total[thread_x()] = f32(0)
        done = u32(0)
        while done < ranks:
            rank = u32(done + (thread_x() >> 5))
            if rank < ranks:
                expert = load(ids, u32(token * k + rank)) if rank < k else i32(0)
                if expert >= 0:
                    column = u32(u32(u32(token * ranks + rank) // every) * 5)
                    column = u32(column * u32(stretches * pairs))
                    w = pick(u32(rank == k), weights, joined, weights, weights)
                    sums(
                        y, u32((thread_x() >> 5) * MOST_ROWS), w, w, x, column,
                        u32(u32(u32(expert) * rows) + first), left, row_pieces, high, scales,
                        supers, shift, stretches, pairs,
                    )  # fmt: skip
            syncthreads()
            if thread_x() < left:
                value, n = total[thread_x()], u32(0)
                while n < WARPS and u32(done + n) < ranks:
                    choice, own = u32(u32(token * k) + u32(done + n)), f32(0)
                    expert = load(ids, choice) if u32(done + n) < k else i32(-1)
                    if expert >= 0 or u32(done + n) == k:
                        own = y[u32(n * MOST_ROWS + thread_x())]
                    if u32(done + n) == k:
                        value = fma(own, opened(opening, token, opening_stride, has_opening), value)
                    if expert >= 0:
                        if has_bias:
                            at = u32(u32(u32(expert) * rows) + u32(first + thread_x()))
                            own += load(bias, at)
                        value = fma(own, load(shares, choice), value) if has_shares else own
                    n = u32(n + 1)
                total[thread_x()] = value
            syncthreads()
            done = u32(done + WARPS)
        if thread_x() < left:
            value, row = total[thread_x()], u32(first + thread_x())
            if has_addend:
                open = opened(opening, token, opening_stride, has_opening)
                value = fma(load(addend, u32(u32(token * addend_stride) + row)), open, value)
            if has_residual:
                value += load(residual, u32(u32(token * residual_stride) + row))
            store(out, u32(u32(token * rows) + row), value)
        tail(
            norm_x, norm_w, normed, norm_packed, tickets, norm_n, norm_eps,
            norm_stretches, norm_length, norm_to,
        )  # fmt: skip

    return expert_total
