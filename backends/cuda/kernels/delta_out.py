"""The gated delta rule with what follows it: the norm of each head, its gate, and int8.

For steps of a few tokens: a block has a whole head, so its norm needs no other. The numbers are
those of `gated_delta` and `norm_gate`, bit for bit.
"""

from __future__ import annotations

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    block_y,
    constant4,
    copy_async16,
    copy_commit,
    copy_wait0,
    entry,
    f32,
    launch_next,
    launch_wait,
    load,
    load2,
    shared,
    shared_load4,
    shared_store4,
    syncthreads,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.plan.catalogue import constants

from .delta import column_of, key_head, recurrence
from .norm import scaled, squares
from .norm_gate import head_factor, pack_rest, silu_times
from .pack import pack_values

DIMS = (32, 64, 128)  # of heads, of keys and of values alike
_CHUNK = 4  # tokens; a warp each behind the recurrence


@constants(dim=DIMS)
def build_delta_out(dim: int) -> Declared:
    """`gated_delta`, then silu(gate) * rms_norm(y, w): [tokens, heads dim] to int8.

    Arguments as those two have them, dk and dv being dim. Grid (heads, sequences).
    """
    rooms, load_state, store_state, fetch, stage, step = recurrence(dim, dim, _CHUNK)
    read_out, pieces = shared("f32", _CHUNK * dim), dim // 4
    shared_weights, shared_gate = shared("f32", dim), shared("f32", 2 * _CHUNK * 128)

    @entry(
        "q:f32* k:f32* v:f32* decay:f32* beta:f32* a:f32* dt:f32* state:f32* spans:i32* "
        "slot_in:i32* slot_out:i32* live:u32* w:f32* gate:f32* out:u32* "
        "q_stride:u32 k_stride:u32 v_stride:u32 decay_stride:u32 beta_stride:u32 gate_stride:u32 "
        "gate_head_stride:u32 heads:u32 key_heads:u32 tiled:u32 gates:u32 scale:f32 eps:f32 "
        "stretches:u32 length:u32",
        threads=4 * dim,
    )
    def delta_out(
        q, k, v, decay, beta, a, dt, state, spans, slot_in, slot_out, live, w, gate, out,
        q_stride, k_stride, v_stride, decay_stride, beta_stride, gate_stride, gate_head_stride,
        heads, key_heads, tiled, gates, scale, eps, stretches, length,
    ):  # fmt: skip
        launch_next()
        s, fetched, keys, queries, values, decays, betas = rooms()
        ys, head, sequence, column = read_out(), block_x(), block_y(), column_of()
        warp, lane = u32(thread_x() >> 5), u32(thread_x() & 31)
        four, whole = min(lane, u32(pieces - 1)), lane < pieces
        key, sequences = key_head(head, heads, key_heads, tiled), load(live, u32(0))
        at = min(sequence, u32(u32(max(sequences, u32(1))) - 1))
        source = load(slot_in, at)
        begin = u32(u32(u32(source) * heads + head) * u32(dim * dim))
        load_state(s, state, begin, dim, dim, column, source >= 0 and sequence < sequences)
        by, opening = shared_weights(), shared_gate()
        if thread_x() < pieces:
            g = constant4(w, lane)
            shared_store4(by, lane, g[0], g[1], g[2], g[3])
        mine, other = thread_x(), u32(thread_x() + 32 * _CHUNK)  # where a lane's gate is and comes
        launch_wait()
        if sequence < sequences:
            first, count = load2(spans, sequence)
            token, left, some, going = u32(first), u32(count), u32(0), u32(1)
            while going > 0:
                behind, ahead = u32(token + some), u32(left - some)
                fetch(
                    fetched, q, k, v, decay, beta, u32(u32(behind * q_stride) + u32(key * dim)),
                    u32(u32(behind * k_stride) + u32(key * dim)),
                    u32(u32(behind * v_stride) + u32(head * dim)),
                    u32(u32(behind * decay_stride) + head), u32(u32(behind * beta_stride) + head),
                    q_stride, k_stride, v_stride, decay_stride, beta_stride, ahead, dim, dim,
                )  # fmt: skip
                mine, other = other, mine
                if warp < min(ahead, u32(_CHUNK)):
                    row = u32(u32(u32(behind + warp) * gate_stride) + u32(head * gate_head_stride))
                    copy_async16(opening, other, gate, u32(u32(row >> 2) + four), u32(16))
                copy_commit()
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
                    place = u32(u32(head * pieces) + lane)
                    g = shared_load4(opening, mine)
                    y = silu_times(g, scaled(y, shared_load4(by, four), r))
                    row = u32(token + warp)
                    pack_values(y, out, row, place, stretches, length, whole)
                    if head == u32(heads - 1):
                        pack_rest(out, row, u32(heads * dim >> 5), stretches, length, lane)
                token, left = u32(token + some), u32(left - some)
                some = min(left, u32(_CHUNK))
                going = some
                if some > 0:
                    copy_wait0()
                    stage(fetched, keys, queries, values, decays, betas, head, a, dt, gates)
                    syncthreads()
            target = u32(u32(u32(load(slot_out, sequence)) * heads + head) * u32(dim * dim))
            store_state(s, state, target, dim, dim, column, True)

    return delta_out
