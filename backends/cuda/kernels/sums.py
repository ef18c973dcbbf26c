"""Sums over the threads of a block, in an order that depends on the block's size alone."""

from __future__ import annotations

from collections.abc import Callable

from runtime.backends.cuda.intrinsics import (
    atomic_add,
    f32,
    shared,
    shared_load4,
    shuffle_xor,
    shuffle_xor_u32,
    store,
    syncthreads,
    thread_x,
    u32,
)  # fmt: skip

STRIDE = 36  # words of shared memory for a value of each lane


def warp_sum(value):
    """The sum over a warp, in every lane."""
    value += shuffle_xor(value, 16)
    value += shuffle_xor(value, 8)
    value += shuffle_xor(value, 4)
    value += shuffle_xor(value, 2)
    value += shuffle_xor(value, 1)
    return value


def block_sum(warps: int) -> Callable:
    """A function of one value per thread: the sum over the block, in every thread; used once."""
    partial = shared("f32", warps)

    def total(value):
        sums = partial()
        value = warp_sum(value)
        if thread_x() & 31 == 0:
            sums[u32(thread_x() >> 5)] = value
        syncthreads()
        value = f32(0)
        for w in range(warps):
            value += sums[w]
        return value

    return total


def last_block() -> Callable:
    """A function that says, in every thread of a block, whether it is the last to come.

    It takes `tickets` u32, one of them, and how many blocks come; what they stored before is seen
    by the last. The ticket is 0 before the first and after the last. Used once.
    """
    told = shared("u32", 1)

    def last(tickets, ticket, blocks):
        earlier = told()
        syncthreads()
        if thread_x() == 0:
            earlier[0] = atomic_add(tickets, ticket, u32(1))
        syncthreads()
        final = earlier[0] == u32(blocks - 1)
        if final and thread_x() == 0:
            store(tickets, ticket, u32(0))
        return final

    return last


def stretch_sum(sums, at, shift):
    """2^`shift` values of shared memory from `at` on, a multiple of as many, added in order."""
    if shift < 2:
        total = sums[at]
        if shift == 1:
            total += sums[u32(at + 1)]
        return total
    a = shared_load4(sums, u32(at >> 2))
    total = a[0] + a[1] + a[2] + a[3]
    for k in range(1, 8):
        if u32(4 * k) < u32(u32(1) << shift):
            a = shared_load4(sums, u32((at >> 2) + k))
            total = total + a[0] + a[1] + a[2] + a[3]
    return total


def better(value, index, other_value, other_index):
    """Whether the other pair wins: the larger value, the lower index among equals."""
    return other_value > value or (other_value == value and other_index < index)


def warp_best(value, index):
    """The winning (value, index) of a warp, in every lane."""
    for step in (16, 8, 4, 2, 1):
        other = shuffle_xor(value, u32(step))
        other_index = shuffle_xor_u32(index, u32(step))
        if better(value, index, other, other_index):
            value, index = other, other_index
    return value, index
