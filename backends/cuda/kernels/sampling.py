"""A token of each row of logits by top-k, top-p, min-p and temperature, in two launches.

A warp finds the best k of 1,024 logits that it holds as keys in registers; sorted lists are merged
by a warp whose lanes hold their heads: those of a block at the end of the first launch, those of a
row in the second. What is chosen depends on the row and its numbers alone, not on how it is cut:
equal logits are in the order of their ids, and all sums begin with the best.

Where the logits are not all finite the token is -1.
"""

from __future__ import annotations

from collections.abc import Callable

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    bits_to_f32,
    block_x,
    block_y,
    divide,
    entry,
    f32,
    fabs,
    fmax,
    grid_x,
    i32,
    launch_next,
    launch_wait,
    load,
    registers,
    shared,
    store,
    syncthreads,
    thread_x,
    u32,
    vote_any,
)  # fmt: skip

from .elementwise import exp
from .topk import ABOVE, NOTHING, NOWHERE, best_of_warp, key_of

MOST = 64  # candidates
MOST_PARTS = 64
PART = 8192  # columns of a block
_WARPS = 8
_PER_LANE = PART // _WARPS // 32
_THREADS = 128  # of the second launch
_LARGEST, _COLDEST = f32(3.4028234663852886e38), f32(1e-30)
_BROKEN = 0xFFFFFFFE  # in place of an id: logits that are no numbers


def _count(temperatures, top_ks, row):
    """How many candidates a row has: one where the temperature is 0."""
    count = u32(min(max(load(top_ks, row), 1), MOST))
    if load(temperatures, row) <= f32(0):
        count = u32(1)
    return count


def _best_of_slice() -> Callable:
    """(logits, base, first, n, k, lane, values, ids, at): the best k of a warp's logits, sorted."""
    mine = registers("i32", _PER_LANE)

    def best(logits, base, first, n, k, lane, values, ids, at):
        keys, broken, rank = mine(), u32(0), u32(0)
        for j in range(_PER_LANE):
            i = u32(first + 32 * j + lane)
            keys[j] = i32(NOTHING)
            if i < n:
                x = load(logits, u32(base + i))
                keys[j] = key_of(x)
                if not fabs(x) <= _LARGEST:
                    broken = u32(1)
        broken = vote_any(broken)
        while rank < k:
            key, index = i32(NOTHING), u32(NOWHERE)
            for j in range(_PER_LANE):
                if keys[j] > key:
                    key, index = keys[j], u32(first + 32 * j + lane)
            key, index = best_of_warp(key, index)
            for j in range(_PER_LANE):
                if index == u32(first + 32 * j + lane):
                    keys[j] = i32(NOTHING)
            if broken:
                key, index = i32(ABOVE), u32(_BROKEN)
            if lane == 0:
                values[u32(at + rank)] = key
                ids[u32(at + rank)] = index
            rank = u32(rank + 1)

    return best


def _merge(lists: int) -> Callable:
    """The best k of `count` sorted lists in shared memory, MOST apart from `base` on, by a warp.

    They go to the first places of the same arrays. A lane has every 32nd list.
    """
    each = -(-lists // 32)
    heads = registers("u32", each)

    def merge(keys, ids, base, count, k, lane):
        at, rank = heads(), u32(0)
        for j in range(each):
            at[j] = u32(base + (32 * j + lane) * MOST)
        while rank < k:
            key, index = i32(NOTHING), u32(NOWHERE)
            for j in range(each):
                end = u32(base + (32 * j + lane) * MOST + k)
                # of equals the first list has the lower ids
                if u32(32 * j + lane) < count and at[j] < end and keys[at[j]] > key:
                    key, index = keys[at[j]], ids[at[j]]
            best, found = best_of_warp(key, index)
            for j in range(each):
                end = u32(base + (32 * j + lane) * MOST + k)
                if u32(32 * j + lane) < count and at[j] < end and ids[at[j]] == found:
                    at[j] = u32(at[j] + 1)
            if lane == 0:
                keys[rank] = best
                ids[rank] = found
            rank = u32(rank + 1)

    return merge


def build_sample_parts() -> Declared:
    """keys i32 and ids u32 [rows, parts, 64]: the best of each part of logits f32 [rows, stride].

    columns, temperatures, top_ks [rows]: how many logits of a row count, and how many are wanted.
    Grid (parts of 8,192 columns, rows).
    """
    best, merge = _best_of_slice(), _merge(_WARPS)
    key_room, id_room = shared("i32", (_WARPS + 1) * MOST), shared("u32", (_WARPS + 1) * MOST)

    @entry(
        "logits:f32* columns:i32* temperatures:f32* top_ks:i32* keys:i32* ids:u32* stride:u32",
        threads=32 * _WARPS,
    )
    def sample_parts(logits, columns, temperatures, top_ks, keys, ids, stride):
        launch_next()
        row, lane, warp = block_y(), u32(thread_x() & 31), u32(thread_x() >> 5)
        near_keys, near_ids = key_room(), id_room()
        launch_wait()
        n, k = u32(load(columns, row)), _count(temperatures, top_ks, row)
        first = u32(block_x() * PART + warp * (32 * _PER_LANE))
        at = u32(u32(1 + warp) * MOST)
        best(logits, u32(row * stride), first, n, k, lane, near_keys, near_ids, at)
        syncthreads()
        if warp == 0:
            merge(near_keys, near_ids, u32(MOST), u32(_WARPS), k, lane)
        syncthreads()
        i = thread_x()
        if i < k:
            place = u32(u32(row * grid_x() + block_x()) * MOST + i)
            store(keys, place, near_keys[i])
            store(ids, place, near_ids[i])

    return sample_parts


def _value_of(key):
    """The number of a key."""
    bits = u32(key)
    if key < 0:
        bits = u32(key ^ 0x7FFFFFFF)
    return bits_to_f32(bits)


def _kept(chances, count, top_p, min_p):
    """How many of the candidates, best first, top_p and then min_p leave; chances of best: 1."""
    total, sum, kept = f32(0), f32(0), u32(0)
    for i in range(count):
        total += chances[i]
    while kept < count and (kept == 0 or top_p >= f32(1) or sum < top_p * total):
        sum += chances[kept]
        kept = u32(kept + 1)
    while kept > 1 and chances[u32(kept - 1)] < min_p:
        kept = u32(kept - 1)
    return kept


def _drawn(chances, count, chance):
    """The first candidate at which the running sum exceeds `chance` of the whole.

    None that adds nothing is drawn, whatever rounding leaves.
    """
    total, sum, at = f32(0), f32(0), u32(0)
    for i in range(count):
        total += chances[i]
    sum = chances[0]
    while at < u32(count - 1) and sum <= chance * total and chances[u32(at + 1)] > f32(0):
        at = u32(at + 1)
        sum += chances[at]
    return at


def build_sample_merge() -> Declared:
    """chosen i32 [rows]: a token of the candidates keys and ids [rows, parts, 64], or -1.

    tokens i32 [rows]: the same, and 0 in place of -1. The other pointers are numbers of each row,
    see `Choice` in backends/base.py. Grid = rows.
    """
    merge = _merge(MOST_PARTS)
    key_room = shared("i32", (MOST_PARTS + 1) * MOST)
    id_room = shared("u32", (MOST_PARTS + 1) * MOST)
    plain_room, warm_room = shared("f32", MOST), shared("f32", MOST)

    @entry(
        "keys:i32* ids:u32* temperatures:f32* top_ks:i32* top_ps:f32* min_ps:f32* chances:f32* "
        "chosen:i32* tokens:i32* parts:u32",
        threads=_THREADS,
    )
    def sample_merge(
        keys, ids, temperatures, top_ks, top_ps, min_ps, chances, chosen, tokens, parts
    ):
        launch_next()
        row, lane = block_x(), thread_x()
        near_keys, near_ids = key_room(), id_room()
        plain, warm = plain_room(), warm_room()
        launch_wait()
        k, i = _count(temperatures, top_ks, row), thread_x()
        while i < u32(parts * MOST):
            if u32(i & (MOST - 1)) < k:
                place = u32(row * u32(parts * MOST) + i)
                near_keys[u32(MOST + i)] = load(keys, place)
                near_ids[u32(MOST + i)] = load(ids, place)
            i = u32(i + _THREADS)
        syncthreads()
        if lane < 32:
            merge(near_keys, near_ids, u32(MOST), parts, k, lane)
        syncthreads()
        warmth = fmax(load(temperatures, row), _COLDEST)
        if lane < k:
            below = _value_of(near_keys[lane]) - _value_of(near_keys[0])
            found = near_ids[lane] < _BROKEN
            plain[lane] = exp(below) if found else f32(0)
            warm[lane] = exp(divide(below, warmth)) if found else f32(0)
        syncthreads()
        if lane == 0:
            count = _kept(plain, k, load(top_ps, row), load(min_ps, row))
            token = i32(near_ids[_drawn(warm, count, load(chances, row))])
            if near_ids[0] >= _BROKEN:
                token = i32(-1)
            store(chosen, row, token)
            store(tokens, row, i32(max(token, 0)))

    return sample_merge
