"""Argmax of long rows in two launches: a block of threads per (part, row), then a warp per row.

Equal values: the lowest index wins, so the result does not depend on how a row is cut.
"""

from __future__ import annotations

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    block_y,
    entry,
    f32,
    grid_x,
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
_LOWEST = f32(-float("inf"))
_NOWHERE = 0xFFFFFFFF


def build_argmax_parts() -> Declared:
    """values f32 and ids u32 [rows, parts]: the best of each part of x f32 [rows, n].

    Grid (parts, rows). A part without numbers (all NaN or empty) has the id 0xFFFFFFFF.
    """
    best_values, best_ids = shared("f32", _WARPS), shared("u32", _WARPS)

    @entry("x:f32* values:f32* ids:u32* n:u32", threads=_THREADS)
    def argmax_parts(x, values, ids, n):
        launch_next()
        row = u32(block_y() * n)
        value, index = _LOWEST, u32(_NOWHERE)
        launch_wait()
        i = u32(block_x() * _THREADS + thread_x())
        while i < n:
            found = load(x, u32(row + i))
            if better(value, index, found, i):
                value, index = found, i
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

    return argmax_parts


def build_argmax_merge() -> Declared:
    """out u32 [rows]: the best of each row's parts; 0 for a row without numbers. Grid = rows."""

    @entry("values:f32* ids:u32* out:u32* parts:u32", threads=32)
    def argmax_merge(values, ids, out, parts):
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
            if index == _NOWHERE:
                index = u32(0)
            store(out, block_x(), index)

    return argmax_merge
