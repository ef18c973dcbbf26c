"""Attention over pages of the cache with a running softmax, the cache split among blocks (Dao 2022;
split KV: Dao et al. 2023).

Grid (splits, KV heads x parts, tiles). A tile is up to 16 rows: the query heads of the KV head of
one or several tokens of a sequence, so a page is read once for all of them; of more than 16 heads
to a KV head each 16 are a part. A split is a fixed number of pages at absolute places. A block
takes 4 pages a step: each warp the scores of one (`attention_scores.py`), then all warps P V of the
four, each for other dims (`attention_values.py`); their V is fetched ahead. Splits are joined in
their order (`attention_join.py`): by the block itself where it takes all, else by the last block to
come. Splits behind the tile's last place end at once, so one grid serves every length.

What a row does not see has the probability 0, so its result depends on nothing else; for that every
page must be finite everywhere (made of zeros, then written).
"""

from __future__ import annotations

from collections.abc import Callable

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    ahead,
    block_x,
    block_y,
    block_z,
    entry,
    exp2,
    f32,
    fmax,
    grid_x,
    grid_y,
    i32,
    launch_next,
    launch_wait,
    load,
    load4,
    registers,
    shared,
    shuffle_xor,
    syncthreads,
    thread_x,
    u32,
    warp_max_i32,
)  # fmt: skip
from runtime.backends.cuda.kv_layout import F16
from runtime.backends.plan.catalogue import constants

from .attention_join import THREADS, fetch, finisher, held_at, join, keep
from .attention_scores import (
    LOG2_E,
    LOWEST,
    ROWS,
    WARPS,
    cap,
    finite,
    hide,
    query_stager,
    row_of,
    row_top,
    scorer,
    soften,
)  # fmt: skip
from .attention_values import adder, probability_room, settle
from .sums import last_block

SPLIT_PAGES = 8  # of the cache, that a block takes
SLOTS = (1, 2)  # groups of 32 dims of V that a warp takes


def _row_exchange() -> tuple[Callable, Callable, Callable]:
    """(offer, top, total): of both rows of a lane, one number of each warp, brought together."""
    room = shared("f32", WARPS * ROWS)

    def offer(low, high):
        numbers = room()
        if thread_x() & 3 == 0:
            at = u32(ROWS * (thread_x() >> 5) + ((thread_x() & 31) >> 2))
            numbers[at], numbers[u32(at + 8)] = low, high

    def top(low, high):
        numbers, row = room(), u32((thread_x() & 31) >> 2)
        for w in range(WARPS):
            low = fmax(low, numbers[u32(ROWS * w + row)])
            high = fmax(high, numbers[u32(ROWS * w + row + 8)])
        return low, high

    def total():
        numbers, row, low, high = room(), u32((thread_x() & 31) >> 2), f32(0), f32(0)
        for w in range(WARPS):
            low += numbers[u32(ROWS * w + row)]
            high += numbers[u32(ROWS * w + row + 8)]
        return low, high

    return offer, top, total


def fetch_ahead(pages, base, pieces):
    """A head's part of a page, `pieces` from piece `base` on, into the L2 cache; by a warp."""
    i = u32(8 * (thread_x() & 31))
    while i < pieces:
        ahead(pages, u32(4 * u32(base + i)))
        i = u32(i + 256)


def _walker(slots: int, words_of: Callable, sums_of: Callable) -> Callable:
    """A function: one split, its sums to acc; (peak, sum) of rows g and g + 8."""
    score_room, lift_room = registers("f32", 16), registers("f32", 2 * slots)
    (put, get), (offer, top, total) = probability_room(WARPS), _row_exchange()
    score, add = scorer(words_of, sums_of), adder()

    def walk(
        acc, k, v, block_table, at, page, end, kv_heads, kv_head, low_place, high_place, window,
        softcap, k_dim, v_dim, k_type, v_type, k_pieces, v_pieces,
    ):  # fmt: skip
        scores, lift, warp = score_room(), lift_room(), u32(thread_x() >> 5)
        k_groups, v_groups = u32((k_dim + 31) >> 5), u32((v_dim + 31) >> 5)
        for n in range(16 * slots):
            acc[n] = f32(0)
        for n in range(2 * slots):
            lift[n] = f32(0)
        low, high, low_sum, high_sum = LOWEST, LOWEST, f32(0), f32(0)
        while page < end:
            mine = u32(page + warp)
            if mine < end:
                block = u32(u32(load(block_table, u32(at + mine)) * kv_heads) + kv_head)
                size = u32(v_groups * v_pieces)
                fetch_ahead(v, u32(block * size), size)
                score(scores, k, u32(u32(block * k_groups) * k_pieces), k_dim, k_type, k_pieces)
                if softcap > f32(0):
                    cap(scores, softcap)
                hide(scores, u32(mine << 5), low_place, high_place, window)
            else:
                for n in range(16):
                    scores[n] = LOWEST
            offer(row_top(scores, 0), row_top(scores, 2))
            syncthreads()
            new_low, new_high = top(low, high)
            decay, other = exp2(low - finite(new_low)), exp2(high - finite(new_high))
            low, high = new_low, new_high
            low_sum = low_sum * decay + soften(scores, 0, low)
            high_sum = high_sum * other + soften(scores, 2, high)
            put(scores, warp)
            syncthreads()
            for n in range(16 * slots):
                acc[n] = acc[n] * (other if n & 2 else decay)
            for n in range(2 * slots):
                lift[n] = lift[n] * (other if n & 1 else decay)
            i = u32(0)
            while i < u32(min(u32(end - page), WARPS)):
                block = u32(u32(load(block_table, u32(at + page + i)) * kv_heads) + kv_head)
                base = u32(u32(u32(block * v_groups) + warp) * v_pieces)
                if warp < v_groups:
                    get(scores, i)
                    add(acc, 0, lift, 0, scores, v, base, v_type)
                if slots > 1 and u32(warp + WARPS) < v_groups:
                    get(scores, i)
                    base = u32(base + WARPS * v_pieces)
                    add(acc, 16, lift, 1, scores, v, base, v_type)
                i = u32(i + 1)
            page = u32(page + WARPS)
        for slot in range(slots):
            settle(acc, 16 * slot, lift, slot, v_type)
        low_sum += shuffle_xor(low_sum, 1)
        low_sum += shuffle_xor(low_sum, 2)
        high_sum += shuffle_xor(high_sum, 1)
        high_sum += shuffle_xor(high_sum, 2)
        offer(low_sum, high_sum)
        syncthreads()
        low_sum, high_sum = total()
        syncthreads()
        return (low, low_sum), (high, high_sum)

    return walk


def _first_state(sinks, has_sinks, head):
    """(peak, sum) of a row before any split: its sink, or nothing."""
    if has_sinks:
        return load(sinks, head) * LOG2_E, f32(1)
    return LOWEST, f32(0)


@constants(slots=SLOTS, f16=(False, True))
def build_attention(slots: int, f16: bool) -> Declared:
    """out f32 [tokens, heads, v_dim], row stride `out_stride`; `f16`: K and V are of that type.

    q f32 [tokens, heads, k_dim] of strides, k_dim a multiple of 4; `group` query heads per KV head,
    in `parts` of 16. tiles u32 [tile, 4]: sequence, first token, tokens (tokens x group <= 16, or
    one). places i32 [tokens]; `block_table` u32 [sequence, block_table_stride]. A split is
    `split_pages` pages; of more than one in the grid each leaves partial f32 [tile, KV head x part,
    split, 128 slots x 16] and stats [.., 16, 2], and counts in tickets u32 [tile, KV head x part].
    factor = scale / ln 2; softcap > 0: in that unit; window > 0: only the last `window` places.
    rotation: `ops.attention`. Where `stretches` is not 0, the result goes to `packed` as int8
    activations, times sigmoid(gate) where `has_gate`: gate f32 [tokens, heads, v_dim] of strides.
    """
    room, acc_room = shared("f32", ROWS * 128 * slots), registers("f32", 16 * slots)
    stage, words_of, sums_of = query_stager(8)
    walk, finish, is_last = _walker(slots, words_of, sums_of), finisher(slots, room), last_block()
    size = 16 * slots

    @entry(
        "q:f32* k:u32* v:u32* block_table:u32* tiles:u32* places:i32* sinks:f32* gate:f32* "
        "out:f32* packed:u32* partial:f32* stats:f32* tickets:u32* "
        "q_stride:u32 q_head_stride:u32 out_stride:u32 "
        "block_table_stride:u32 kv_heads:u32 group:u32 parts:u32 k_dim:u32 v_dim:u32 k_type:u32 "
        "v_type:u32 k_pieces:u32 v_pieces:u32 split_pages:u32 factor:f32 softcap:f32 window:i32 "
        "has_sinks:u32 rotation:u32 gate_stride:u32 gate_head_stride:u32 has_gate:u32 "
        "stretches:u32 length:u32",
        threads=THREADS,
        min_blocks=3 if f16 and slots == 1 else 2,
    )
    def attention(
        q, k, v, block_table, tiles, places, sinks, gate, out, packed, partial, stats, tickets,
        q_stride, q_head_stride, out_stride, block_table_stride, kv_heads, group, parts, k_dim,
        v_dim, k_type, v_type, k_pieces, v_pieces, split_pages, factor, softcap, window, has_sinks,
        rotation, gate_stride, gate_head_stride, has_gate, stretches, length,
    ):  # fmt: skip
        launch_next()
        held, acc = room(), acc_room()
        kv_head = u32(block_y() // parts)
        part = u32(block_y() - u32(kv_head * parts))
        low_row = u32((thread_x() & 31) >> 2)
        if f16:
            k_type, v_type = u32(F16), u32(F16)
        launch_wait()
        tile = load4(tiles, block_z())
        if tile[2] != 0:
            low_token, low_head, _ = row_of(low_row, tile, part, group)
            high_token, high_head, _ = row_of(u32(low_row + 8), tile, part, group)
            low_place, high_place = load(places, low_token), load(places, high_token)
            last = u32(warp_max_i32(max(low_place, high_place)))
            nearest = i32(-warp_max_i32(max(i32(-low_place), i32(-high_place))))
            pages, first = u32((last >> 5) + 1), u32(0)
            if window > 0 and nearest >= window:
                first = u32(u32(nearest - window + 1) >> 5)
            begin, stop = u32(first // split_pages), u32((last >> 5) // split_pages + 1)
            alone = grid_x() == 1 or stop == begin + 1
            split = begin if grid_x() == 1 else block_x()
            until = stop if grid_x() == 1 else u32(split + 1)
            if begin <= split and split < stop:
                stage(
                    q, tile, part, kv_head, group, q_stride, q_head_stride, k_dim, factor,
                    k_type == F16,
                )  # fmt: skip
                syncthreads()
                low = _first_state(sinks, has_sinks, u32(kv_head * group + low_head))
                high = _first_state(sinks, has_sinks, u32(kv_head * group + high_head))
                for n in range(size):
                    held[held_at(n)] = f32(0)
                cell = u32(u32(u32(block_z() * grid_y()) + block_y()) * grid_x())
                while split < until:
                    page = u32(split * split_pages)
                    end = u32(min(u32(page + split_pages), pages))
                    if page < first:
                        page = u32(page + u32(u32(first - page) & 0xFFFFFFFC))
                    low_part, high_part = walk(
                        acc, k, v, block_table, u32(tile[0] * block_table_stride), page, end,
                        kv_heads, kv_head, low_place, high_place, window, softcap, k_dim, v_dim,
                        k_type, v_type, k_pieces, v_pieces,
                    )  # fmt: skip
                    if alone:
                        low, high = join(held, acc, size, low, high, low_part, high_part)
                    else:
                        keep(acc, size, low_part, high_part, partial, stats, u32(cell + split))
                    split = u32(split + 1)
                final = alone
                if not alone:
                    ticket = u32(u32(block_z() * grid_y()) + block_y())
                    final = is_last(tickets, ticket, u32(stop - begin))
                    split = begin if final else stop
                    while split < stop:
                        low_part, high_part = fetch(acc, size, partial, stats, u32(cell + split))
                        low, high = join(held, acc, size, low, high, low_part, high_part)
                        split = u32(split + 1)
                if final:
                    finish(
                        acc, low, high, out, gate, packed, tile, part, kv_head, group,
                        out_stride, v_dim, rotation, gate_stride, gate_head_stride, has_gate,
                        stretches, length,
                    )  # fmt: skip

    return attention
