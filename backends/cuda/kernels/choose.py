"""The best token of each row of logits in two launches: a block of threads per (part, row), then a
warp per row, which writes it where the next step reads its tokens.

Equal logits: the lowest id wins, so the result does not depend on how a row is cut.
"""

from __future__ import annotations

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    block_y,
    entry,
    f32,
    fabs,
    grid_x,
    i32,
    launch_next,
    launch_wait,
    load,
    shared,
    store,
    syncthreads,
    thread_x,
    u32,
)  # fmt: skip

from .sums import better, warp_best

_WARPS = 8
_THREADS = 32 * _WARPS
_LOWEST, _HIGHEST = f32(-float("inf")), f32(float("inf"))
_LARGEST = f32(3.4028234663852886e38)
_NOWHERE, _BROKEN = 0xFFFFFFFF, 0xFFFFFFFE  # ids of a part without columns, and of no numbers


def build_choose_parts() -> Declared:
    """values f32 and ids u32 [rows, parts]: the best of each part of logits f32 [rows, stride].

    columns i32 [rows]: how many of a row, from its first on. Grid (parts, rows).
    """
    best_values, best_ids = shared("f32", _WARPS), shared("u32", _WARPS)

    @entry("logits:f32* columns:i32* values:f32* ids:u32* stride:u32", threads=_THREADS)
    def choose_parts(logits, columns, values, ids, stride):
        launch_next()
        row = u32(block_y() * stride)
        value, index = _LOWEST, u32(_NOWHERE)
        launch_wait()
        n = u32(load(columns, block_y()))
        i = u32(block_x() * _THREADS + thread_x())
        while i < n:
            found, at = load(logits, u32(row + i)), i
            if not fabs(found) <= _LARGEST:
                found, at = _HIGHEST, u32(_BROKEN)
            if better(value, index, found, at):
                value, index = found, at
            i = u32(i + grid_x() * _THREADS)
        value, index = warp_best(value, index)
        shared_values, shared_ids = best_values(), best_ids()
        if thread_x() & 31 == 0:
            shared_values[u32(thread_x() >> 5)] = value
            shared_ids[u32(thread_x() >> 5)] = index
        syncthreads()
        if thread_x() == 0:
            for w in range(1, _WARPS):
                if better(value, index, shared_values[w], shared_ids[w]):
                    value, index = shared_values[w], shared_ids[w]
            place = u32(block_y() * grid_x() + block_x())
            store(values, place, value)
            store(ids, place, index)

    return choose_parts


def build_choose_merge() -> Declared:
    """chosen i32 [rows]: the best of each row's parts, -1 where its logits are not all finite.

    tokens i32 [rows]: the same, and 0 in place of -1. Grid = rows.
    """

    @entry("values:f32* ids:u32* chosen:i32* tokens:i32* parts:u32", threads=32)
    def choose_merge(values, ids, chosen, tokens, parts):
        launch_next()
        value, index = _LOWEST, u32(_NOWHERE)
        launch_wait()
        i = thread_x()
        while i < parts:
            place = u32(block_x() * parts + i)
            found, at = load(values, place), load(ids, place)
            if better(value, index, found, at):
                value, index = found, at
            i = u32(i + 32)
        value, index = warp_best(value, index)
        if thread_x() == 0:
            token = i32(index)
            if index >= _BROKEN:
                token = i32(0)
                index = u32(_NOWHERE)
            store(tokens, block_x(), token)
            store(chosen, block_x(), i32(index))

    return choose_merge
