"""The largest of a row, and what belongs to the chosen: numbers order as the CPU orders them.

A number becomes an integer key, larger for larger numbers: both zeros are equal, NaN is the
lowest. Equal keys: the lower index wins. A warp finds the best of its lanes in two reductions.
"""

from __future__ import annotations

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    entry,
    f32,
    f32_to_bits,
    i32,
    launch_next,
    launch_wait,
    load,
    store,
    thread_x,
    u32,
    warp_max_i32,
    warp_min_u32,
)  # fmt: skip

NOTHING, _NAN = -(2**31), -(2**31) + 1  # keys below those of all numbers
ABOVE = 2**31 - 1
NOWHERE = 0xFFFFFFFF
_THREADS = 128


def key_of(x):
    """The key of a float32."""
    bits = i32(f32_to_bits(x + f32(0)))
    key = bits
    if bits < 0:
        key = i32(bits ^ 0x7FFFFFFF)
    if x != x:
        key = i32(_NAN)
    return key


def best_of_warp(key, index):
    """The largest key of a warp and the lowest index that has it, in every lane."""
    best = warp_max_i32(key)
    candidate = index
    if key != best:
        candidate = u32(NOWHERE)
    return best, warp_min_u32(candidate)


def next_best(x, base, n, last_key, last_index, lane):
    """Key and index of the best of a row's n numbers that comes after (last_key, last_index)."""
    best, at = i32(NOTHING), u32(NOWHERE)
    i = lane
    while i < n:
        key = key_of(load(x, u32(base + i)))
        behind = key < last_key or (key == last_key and i > last_index)
        if behind and key > best:
            best, at = key, i
        i = u32(i + 32)
    return best_of_warp(best, at)


def build_top_k() -> Declared:
    """out i32 [rows, k]: indices of the k largest of each row of n f32, largest first.

    A warp a row, which finds rank after rank. Grid = rows.
    """

    @entry("x:f32* out:i32* n:u32 k:u32 x_stride:u32", threads=32)
    def top_k(x, out, n, k, x_stride):
        launch_next()
        base, lane = u32(block_x() * x_stride), thread_x()
        key, index = i32(ABOVE), u32(0)
        launch_wait()
        rank = u32(0)
        while rank < k:
            key, index = next_best(x, base, n, key, index, lane)
            if lane == 0:
                store(out, u32(block_x() * k + rank), i32(index))
            rank = u32(rank + 1)

    return top_k


def build_take() -> Declared:
    """out[row, j] = x[row, ids[row, j]]: `count` elements in rows of k. Grid (count / 128)."""

    @entry("x:f32* ids:i32* out:f32* k:u32 count:u32 x_stride:u32", threads=_THREADS)
    def take(x, ids, out, k, count, x_stride):
        launch_next()
        at = u32(block_x() * _THREADS + thread_x())
        row = u32(at // k)
        launch_wait()
        if at < count:
            store(out, at, load(x, u32(row * x_stride + u32(load(ids, at)))))

    return take


def build_renumber() -> Declared:
    """out[i] = numbers[ids[i]] for `count` ids. Grid (count / 128)."""

    @entry("ids:i32* numbers:i32* out:i32* count:u32", threads=_THREADS)
    def renumber(ids, numbers, out, count):
        launch_next()
        at = u32(block_x() * _THREADS + thread_x())
        launch_wait()
        if at < count:
            store(out, at, load(numbers, u32(load(ids, at))))

    return renumber
