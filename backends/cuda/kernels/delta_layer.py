"""A gated delta-net layer between its projections in one launch, for steps of a few tokens.

A block has a value head of a sequence: the convolution, SiLU and L2 norm of its query, key and
value, the recurrence, the norm of the head, its gate, and int8. The numbers are those of
`short_conv`, `gated_delta` and `norm_gate`, bit for bit. Value heads that share a key head each
convolve its query and key; the last of them to have done so leaves the new inputs in the slot.
"""

from __future__ import annotations

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    atomic_add,
    block_x,
    block_y,
    constant4,
    copy_async16,
    copy_commit,
    copy_wait0,
    entry,
    f32,
    fma,
    i32,
    launch_next,
    launch_wait,
    load,
    load2,
    rsqrt,
    shared,
    shared_load4,
    shared_store4,
    store,
    syncthreads,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.plan.catalogue import constants

from .delta import column_of, decay_of, key_head, recurrence
from .elementwise import sigmoid, silu
from .norm import scaled, squares
from .norm_gate import head_factor, pack_rest, silu_times
from .pack import pack_values
from .short_conv import input_at
from .sums import warp_sum

DIMS = (32, 64, 128)  # of heads, of keys and of values alike
TAPS = 4
_CHUNK = 4  # tokens


def filtered(x, filters, conv, row, t, past, channel, x_stride, channels):
    """SiLU of a channel's sum over four taps for token t of a sequence."""
    a = input_at(x, conv, row, i32(t - 3), past, channel, x_stride, channels, TAPS)
    b = input_at(x, conv, row, i32(t - 2), past, channel, x_stride, channels, TAPS)
    c = input_at(x, conv, row, i32(t - 1), past, channel, x_stride, channels, TAPS)
    d = input_at(x, conv, row, i32(t), past, channel, x_stride, channels, TAPS)
    w = constant4(filters, channel)
    return silu(fma(w[3], d, fma(w[2], c, fma(w[1], b, fma(w[0], a, f32(0))))))


@constants(dim=DIMS)
def build_delta_layer(dim: int) -> Declared:
    """Inputs of the convolution x [tokens, channels] to packed int8 [tokens, heads dim].

    q_at, k_at, v_at: the first channel of queries, keys, values; `conv` [slots, 3, channels] and
    `state` [slots, heads, dim, dim] are kept for a sequence. tickets: one a sequence and key head.
    All else as in the kernels this one stands for. Grid (heads, sequences).
    """
    recurrent = recurrence(dim, dim, _CHUNK)
    rooms, load_state, store_state, step = (
        recurrent.rooms, recurrent.load_state, recurrent.store_state, recurrent.step,
    )  # fmt: skip
    pieces, lanes, warps = dim // 4, dim // 32, dim // 8
    read_out, told = shared("f32", _CHUNK * dim), shared("u32", 1)
    shared_weights, shared_gate = shared("f32", dim), shared("f32", _CHUNK * 128)

    def unit(heads_of, at, eps):
        """The L2 norm of a head in shared memory that begins at `at`, by one warp."""
        lane, square = u32(thread_x() & 31), f32(0)
        for m in range(lanes):
            v = heads_of[u32(at + lane + 32 * m)]
            square = fma(v, v, square)
        factor = rsqrt(warp_sum(square) + eps)
        for m in range(lanes):
            i = u32(at + lane + 32 * m)
            heads_of[i] = heads_of[i] * factor

    def hand_over(
        x, conv, tickets, ticket, spans, slot_in, slot_out, sequence, q_at, k_at, x_stride, channels
    ):  # fmt: skip
        """New inputs of a query's and a key's channels to the slot; the ticket as it was."""
        first, count = load2(spans, sequence)
        source, part, c = load(slot_in, sequence), u32(thread_x() // dim), u32(thread_x() % dim)
        of_q, of_k, token = f32(0), f32(0), i32(i32(count) - 3 + i32(part))
        if part < 3:
            row = u32(first)
            of_q = input_at(x, conv, row, token, source, u32(q_at + c), x_stride, channels, TAPS)
            of_k = input_at(x, conv, row, token, source, u32(k_at + c), x_stride, channels, TAPS)
        syncthreads()
        if part < 3:
            kept = u32(u32(u32(3 * u32(load(slot_out, sequence))) + part) * channels)
            store(conv, u32(kept + u32(q_at + c)), of_q)
            store(conv, u32(kept + u32(k_at + c)), of_k)
        if thread_x() == 0:
            store(tickets, ticket, u32(0))

    @entry(
        "x:f32* filters:f32* conv:f32* alpha:f32* beta:f32* a:f32* dt:f32* state:f32* spans:i32* "
        "slot_in:i32* slot_out:i32* live:u32* w:f32* gate:f32* out:u32* tickets:u32* channels:u32 "
        "x_stride:u32 alpha_stride:u32 beta_stride:u32 gate_stride:u32 gate_head_stride:u32 "
        "q_at:u32 k_at:u32 v_at:u32 heads:u32 key_heads:u32 tiled:u32 gates:u32 scale:f32 "
        "l2_eps:f32 eps:f32 stretches:u32 length:u32",
        threads=4 * dim,
    )
    def delta_layer(
        x, filters, conv, alpha, beta, a, dt, state, spans, slot_in, slot_out, live, w, gate, out,
        tickets, channels, x_stride, alpha_stride, beta_stride, gate_stride, gate_head_stride,
        q_at, k_at, v_at, heads, key_heads, tiled, gates, scale, l2_eps, eps, stretches, length,
    ):  # fmt: skip
        launch_next()
        s, _, keys, queries, values, decays, betas = rooms()
        ys, by, opening = read_out(), shared_weights(), shared_gate()
        head, sequence, column = block_x(), block_y(), column_of()
        warp, lane = u32(thread_x() >> 5), u32(thread_x() & 31)
        part, c = u32(thread_x() // dim), u32(thread_x() % dim)
        four, whole = min(lane, u32(pieces - 1)), lane < pieces
        key, sequences = key_head(head, heads, key_heads, tiled), load(live, u32(0))
        source = load(slot_in, min(sequence, u32(u32(max(sequences, u32(1))) - 1)))
        begin = u32(u32(u32(source) * heads + head) * u32(dim * dim))
        load_state(s, state, begin, dim, dim, column, source >= 0 and sequence < sequences)
        if thread_x() < pieces:
            g = constant4(w, lane)
            shared_store4(by, lane, g[0], g[1], g[2], g[3])
        q_c, k_c = u32(u32(q_at + key * dim) + c), u32(u32(k_at + key * dim) + c)
        v_c, earlier = u32(u32(v_at + head * dim) + c), u32(0)
        launch_wait()
        if sequence < sequences:
            first, count = load2(spans, sequence)
            row, target = u32(first), u32(load(slot_out, sequence))
            at, left, going = u32(0), u32(count), u32(1)
            while going > 0:
                some, token = min(left, u32(_CHUNK)), u32(row + at)
                i = part
                while i < u32(3 * some):
                    t = u32(i // u32(3))
                    region, to = u32(i - u32(3 * t)), u32(u32(t * dim) + c)
                    channel = v_c if region == 2 else (k_c if region == 1 else q_c)
                    t = u32(at + t)
                    value = filtered(x, filters, conv, row, t, source, channel, x_stride, channels)
                    if region == 0:
                        queries[to] = value
                    elif region == 1:
                        keys[to] = value
                    else:
                        values[to] = value
                    i = u32(i + 4)
                if warp < some:
                    place = u32(u32(u32(token + warp) * gate_stride) + u32(head * gate_head_stride))
                    copy_async16(opening, thread_x(), gate, u32(u32(place >> 2) + four), u32(16))
                copy_commit()
                if thread_x() < some:
                    place = u32(token + thread_x())
                    raw = load(alpha, u32(u32(place * alpha_stride) + head))
                    decays[thread_x()] = decay_of(raw, head, a, dt, gates)
                    betas[thread_x()] = sigmoid(load(beta, u32(u32(place * beta_stride) + head)))
                copy_wait0()
                syncthreads()
                new = f32(0)
                if at == 0:
                    if part < 3:
                        behind = i32(i32(count) - 3 + i32(part))
                        new = input_at(x, conv, row, behind, source, v_c, x_stride, channels, TAPS)
                    if thread_x() == 0:
                        ticket = u32(u32(sequence * key_heads) + key)
                        earlier = atomic_add(tickets, ticket, u32(1))
                i = warp
                while i < u32(2 * some):
                    if i & 1:
                        unit(keys, u32((i >> 1) * dim), l2_eps)
                    else:
                        unit(queries, u32((i >> 1) * dim), l2_eps)
                    i = u32(i + warps)
                syncthreads()
                if at == 0 and part < 3:
                    store(conv, u32(u32(u32(3 * target + part) * channels) + v_c), new)
                i = u32(0)
                while i < some:
                    value = values[u32(u32(i * dim) + column)]
                    read = step(s, keys, queries, value, decays[i], betas[i], i)
                    if thread_x() & 24 == 0:
                        ys[u32(u32(i * dim) + column)] = read * scale
                    i = u32(i + 1)
                syncthreads()
                if warp < some:
                    y = shared_load4(ys, u32(u32(warp * pieces) + four))
                    r = head_factor(squares(y, f32(0)) if whole else f32(0), u32(dim), eps)
                    place, to_row = u32(u32(head * pieces) + lane), u32(token + warp)
                    g = shared_load4(opening, thread_x())
                    y = silu_times(g, scaled(y, shared_load4(by, four), r))
                    pack_values(y, out, to_row, place, stretches, length, whole)
                    if head == u32(heads - 1):
                        pack_rest(out, to_row, u32(heads * dim >> 5), stretches, length, lane)
                at, left = u32(at + some), u32(left - some)
                going = left
            begin = u32(u32(target * heads + head) * u32(dim * dim))
            store_state(s, state, begin, dim, dim, column, True)
            last = told()
            if thread_x() == 0:
                last[0] = earlier
            syncthreads()
            if last[0] == u32(u32(heads // key_heads) - 1):
                hand_over(
                    x, conv, tickets, u32(u32(sequence * key_heads) + key), spans, slot_in,
                    slot_out, sequence, u32(q_at + key * dim), u32(k_at + key * dim), x_stride,
                    channels,
                )  # fmt: skip

    return delta_layer
