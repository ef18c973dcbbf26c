"""The gated delta rule (Yang et al. 2024), token by token, with the state of a head in registers.

Parallel over (sequence x value head x column of its state S [dk, dv]): columns never meet. Four
lanes share a column; lane p of them has rows 16 j + 4 p to 16 j + 4 p + 3, and a warp has 8
columns, so that its loads are whole sectors. Of a token S^T k is added up by the lanes, then in one
pass S is decayed, corrected and read out. The lanes add in an order that depends on dk alone,
whichever kernel does it and however a prompt was cut.

Tokens come in chunks: keys, queries, values and gates of a chunk are fetched while the one before
is worked on, and lie in shared memory, where each lane reads those of its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    block_y,
    block_z,
    entry,
    f32,
    fma,
    launch_next,
    launch_wait,
    load,
    load2,
    registers,
    shared,
    shared_load4,
    shuffle_xor,
    store,
    syncthreads,
    syncwarp,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.plan.catalogue import constants

from .elementwise import exp, sigmoid, softplus

ROWS = (32, 64, 128)  # of a state: dk, or the next above it
COLUMNS, _CHUNK = 32, 8  # of a block; tokens


def decay_of(x, head, a, dt, gates):
    """What a state is multiplied with: e^x, or of a raw x (gates > 0) e^(a softplus(x + dt))."""
    if gates > 1:
        x += load(dt, head)
    if gates > 0:
        x = softplus(x) * load(a, head)
    return exp(x)


class Recurrence(NamedTuple):
    """Parts of a kernel of `rows` x `columns` of a state and chunks of `tokens`; made once in it.

    `rooms()`: registers and shared memory, which the others take.
    """

    rooms: Callable
    load_state: Callable
    store_state: Callable
    fetch: Callable
    stage: Callable
    step: Callable


def quarter_sum(value):
    """The sum over the four lanes of a column, in each of them."""
    value += shuffle_xor(value, 8)
    value += shuffle_xor(value, 16)
    return value


def recurrence(rows: int, columns: int, tokens: int) -> Recurrence:
    """See `Recurrence`; a block has 4 threads a column."""
    threads, pieces = 4 * columns, rows // 16
    per_row, per_column = tokens * rows // threads, tokens * columns // threads
    last = 2 * per_row + per_column
    state_registers = registers("f32", rows // 4)
    fetched_registers = registers("f32", last + 2)
    shared_keys, shared_queries = shared("f32", tokens * rows), shared("f32", tokens * rows)
    shared_values = shared("f32", tokens * columns)
    shared_decays, shared_betas = shared("f32", tokens), shared("f32", tokens)

    def rooms():
        return (
            state_registers(), fetched_registers(), shared_keys(), shared_queries(),
            shared_values(), shared_decays(), shared_betas(),
        )  # fmt: skip

    def load_state(s, state, begin, dk, dv, column, there):
        """This lane's rows of a column of the state that begins at `begin`; zeros elsewhere."""
        first = u32(u32(thread_x() >> 3 & 3) * 4)
        for j in range(pieces):
            for e in range(4):
                row = u32(first + 16 * j + e)
                s[4 * j + e] = f32(0)
                if there and row < dk:
                    s[4 * j + e] = load(state, u32(begin + u32(row * dv) + column))

    def store_state(s, state, begin, dk, dv, column, there):
        """The inverse of `load_state`."""
        first = u32(u32(thread_x() >> 3 & 3) * 4)
        for j in range(pieces):
            for e in range(4):
                row = u32(first + 16 * j + e)
                if there and row < dk:
                    store(state, u32(begin + u32(row * dv) + column), s[4 * j + e])

    def fetch(
        into, q, k, v, decay, beta, q_at, k_at, v_at, decay_at, beta_at, q_stride, k_stride,
        v_stride, decay_stride, beta_stride, left, dk, n,
    ):  # fmt: skip
        """Ask for the next tokens, `left` at most; of values there are n columns."""
        for j in range(per_row):
            i = u32(thread_x() + threads * j)
            token, row = u32(i // rows), u32(i % rows)
            into[2 * j], into[2 * j + 1] = f32(0), f32(0)
            if token < left and row < dk:
                into[2 * j] = load(k, u32(k_at + u32(token * k_stride) + row))
                into[2 * j + 1] = load(q, u32(q_at + u32(token * q_stride) + row))
        for j in range(per_column):
            i = u32(thread_x() + threads * j)
            token, column = u32(i // columns), u32(i % columns)
            into[2 * per_row + j] = f32(0)
            if token < left and column < n:
                into[2 * per_row + j] = load(v, u32(v_at + u32(token * v_stride) + column))
        token = thread_x()
        into[last], into[last + 1] = f32(0), f32(0)
        if token < tokens and token < left:
            into[last] = load(decay, u32(decay_at + u32(token * decay_stride)))
            into[last + 1] = load(beta, u32(beta_at + u32(token * beta_stride)))

    def stage(fetched, keys, queries, values, decays, betas, head, a, dt, gates):
        """What was fetched to shared memory, gates as factors."""
        for j in range(per_row):
            i = u32(thread_x() + threads * j)
            keys[i], queries[i] = fetched[2 * j], fetched[2 * j + 1]
        for j in range(per_column):
            values[u32(thread_x() + threads * j)] = fetched[2 * per_row + j]
        if thread_x() < tokens:
            decays[thread_x()] = decay_of(fetched[last], head, a, dt, gates)
            by = fetched[last + 1]
            betas[thread_x()] = sigmoid(by) if gates > 0 else by

    def step(s, keys, queries, value, decay, beta, token):
        """One token: the state of a column after it, and what is read out of it."""
        at = u32(u32(token * (rows // 4)) + u32(thread_x() >> 3 & 3))
        even, odd = f32(0), f32(0)
        for j in range(pieces):
            k = shared_load4(keys, u32(at + 4 * j))
            even, odd = fma(k[0], s[4 * j], even), fma(k[1], s[4 * j + 1], odd)
            even, odd = fma(k[2], s[4 * j + 2], even), fma(k[3], s[4 * j + 3], odd)
        error = fma(-decay, quarter_sum(even + odd), value) * beta
        syncwarp()  # here and below: so that few keys wait in registers, which hold the state
        even, odd = f32(0), f32(0)
        for half in range(2):
            for n in range(pieces // 2):
                j = half * (pieces // 2) + n
                k, q = shared_load4(keys, u32(at + 4 * j)), shared_load4(queries, u32(at + 4 * j))
                s[4 * j] = fma(k[0], error, s[4 * j] * decay)
                s[4 * j + 1] = fma(k[1], error, s[4 * j + 1] * decay)
                s[4 * j + 2] = fma(k[2], error, s[4 * j + 2] * decay)
                s[4 * j + 3] = fma(k[3], error, s[4 * j + 3] * decay)
                even, odd = fma(q[0], s[4 * j], even), fma(q[1], s[4 * j + 1], odd)
                even, odd = fma(q[2], s[4 * j + 2], even), fma(q[3], s[4 * j + 3], odd)
            syncwarp()
        return quarter_sum(even + odd)

    return Recurrence(rooms, load_state, store_state, fetch, stage, step)


def column_of():
    """This lane's column of its block."""
    return u32(u32(u32(thread_x() >> 5) * 8) + u32(thread_x() & 7))


def key_head(head, heads, key_heads, tiled):
    """The key head of a value head; see ops/delta.py."""
    return u32(head % key_heads) if tiled else u32(head // u32(heads // key_heads))


@constants(rows=ROWS)
def build_gated_delta(rows: int) -> Declared:
    """out f32 [tokens, heads, dv], and the state of each sequence in slot_out, from slot_in.

    q, k [tokens, key heads, dk <= rows], v [tokens, heads, dv], decay and beta [tokens, heads]:
    heads dense, tokens strides apart; `gates` 0: as they are, 1: raw with a, 2: with a and dt.
    State [slots, heads, dk, dv]; other launches of a step leave it alone, so it is asked for before
    they end. Grid (dv / 32 rounded up, heads, sequences): block z takes every `at_once`-th.
    """
    rooms, load_state, store_state, fetch, stage, step = recurrence(rows, COLUMNS, _CHUNK)

    @entry(
        "q:f32* k:f32* v:f32* decay:f32* beta:f32* a:f32* dt:f32* state:f32* spans:i32* "
        "slot_in:i32* slot_out:i32* live:u32* out:f32* q_stride:u32 k_stride:u32 v_stride:u32 "
        "decay_stride:u32 beta_stride:u32 heads:u32 key_heads:u32 dk:u32 dv:u32 tiled:u32 "
        "gates:u32 scale:f32 at_once:u32",
        threads=4 * COLUMNS,
    )
    def gated_delta(
        q, k, v, decay, beta, a, dt, state, spans, slot_in, slot_out, live, out, q_stride, k_stride,
        v_stride, decay_stride, beta_stride, heads, key_heads, dk, dv, tiled, gates, scale, at_once,
    ):  # fmt: skip
        launch_next()
        s, fetched, keys, queries, values, decays, betas = rooms()
        start, head, sequence = u32(COLUMNS * block_x()), block_y(), block_z()
        mine = column_of()
        n = min(u32(COLUMNS), u32(dv - start))
        there, column = mine < n, u32(start + mine)
        key, sequences = key_head(head, heads, key_heads, tiled), load(live, u32(0))
        at = min(sequence, u32(u32(max(sequences, u32(1))) - 1))
        source = load(slot_in, at)
        begin = u32(u32(u32(source) * heads + head) * u32(dk * dv))
        load_state(s, state, begin, dk, dv, column, there and source >= 0 and sequence < sequences)
        launch_wait()
        while sequence < sequences:
            first, count = load2(spans, sequence)
            token, left, some, going = u32(first), u32(count), u32(0), u32(1)
            while going > 0:
                behind = u32(token + some)
                fetch(
                    fetched, q, k, v, decay, beta, u32(u32(behind * q_stride) + u32(key * dk)),
                    u32(u32(behind * k_stride) + u32(key * dk)),
                    u32(u32(behind * v_stride) + u32(u32(head * dv) + start)),
                    u32(u32(behind * decay_stride) + head), u32(u32(behind * beta_stride) + head),
                    q_stride, k_stride, v_stride, decay_stride, beta_stride, u32(left - some), dk,
                    n,
                )  # fmt: skip
                i = u32(0)
                while i < some:
                    value = values[u32(u32(i * COLUMNS) + mine)]
                    read = step(s, keys, queries, value, decays[i], betas[i], i)
                    if there and thread_x() & 24 == 0:
                        place = u32(u32(u32(u32(token + i) * heads) + head) * dv)
                        store(out, u32(place + column), read * scale)
                    i = u32(i + 1)
                token, left = u32(token + some), u32(left - some)
                some = min(left, u32(_CHUNK))
                going = some
                if some > 0:
                    syncthreads()
                    stage(fetched, keys, queries, values, decays, betas, head, a, dt, gates)
                    syncthreads()
            target = u32(u32(u32(load(slot_out, sequence)) * heads + head) * u32(dk * dv))
            store_state(s, state, target, dk, dv, column, there)
            sequence = u32(sequence + at_once)
            if sequence < sequences:
                source = load(slot_in, sequence)
                begin = u32(u32(u32(source) * heads + head) * u32(dk * dv))
                load_state(s, state, begin, dk, dv, column, there and source >= 0)

    return gated_delta
