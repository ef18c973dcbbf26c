"""The choices of a step by the expert they are of: a block of threads an expert.

Every block counts the choices of lower experts and of its own, a run of choices a thread, and
writes its own, in order, behind those. Nothing depends on what the others write.
"""

from __future__ import annotations

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    entry,
    i32,
    launch_next,
    launch_wait,
    load,
    shared,
    store,
    store4,
    syncthreads,
    thread_x,
    u32,
    warp_sum_i32,
)  # fmt: skip

_WARPS = 8
_THREADS = 32 * _WARPS


def build_expert_group() -> Declared:
    """`order` u32: the choices of each expert, in order; `groups` u32 [capacity, 4]: its tiles.

    ids i32 [live, k], below 0 where the expert is elsewhere. A group is (expert, first in `order`,
    choices, 0), `width` choices or fewer; those without choices are none. Grid = `experts`.
    """
    counts, lower_sums, own_sums = shared("u32", _THREADS), shared("u32", _WARPS), shared("u32", 8)

    @entry(
        "ids:i32* live:u32* order:u32* groups:u32* k:u32 experts:u32 width:u32 capacity:u32",
        threads=_THREADS,
    )
    def expert_group(ids, live, order, groups, k, experts, width, capacity):
        launch_next()
        mine, lowers, owns = counts(), lower_sums(), own_sums()
        expert, thread = i32(block_x()), u32(thread_x())
        launch_wait()
        n = u32(load(live, u32(0)) * k)
        run = u32(u32(n + (_THREADS - 1)) // _THREADS)
        at, end = u32(min(u32(thread * run), n)), u32(min(u32(u32(thread + 1) * run), n))
        lower, own = u32(0), u32(0)
        i = at
        while i < end:
            chosen = load(ids, i)
            if chosen == expert:
                own = u32(own + 1)
            elif chosen >= 0 and chosen < expert:
                lower = u32(lower + 1)
            i = u32(i + 1)
        mine[thread] = own
        lower_sum, own_sum = warp_sum_i32(i32(lower)), warp_sum_i32(i32(own))
        if (thread & 31) == 0:
            lowers[u32(thread >> 5)], owns[u32(thread >> 5)] = u32(lower_sum), u32(own_sum)
        syncthreads()
        first, count, to = u32(0), u32(0), u32(0)
        for w in range(_WARPS):
            if w < u32(thread >> 5):
                to = u32(to + owns[w])
            first, count = u32(first + lowers[w]), u32(count + owns[w])
        to = u32(to + first)
        i = u32(thread & ~31)
        while i < thread:
            to = u32(to + mine[i])
            i = u32(i + 1)
        i = at
        while i < end:
            if load(ids, i) == expert:
                store(order, to, i)
                to = u32(to + 1)
            i = u32(i + 1)
        e = u32(block_x())
        group = first_group(first, e, width)
        after = first_group(u32(first + count), u32(e + 1), width)
        after = after if u32(e + 1) < experts else capacity
        i = u32(group + thread)
        while i < after:
            begin = u32(u32(i - group) * width)
            left = u32(min(u32(count - begin), width)) if begin < count else u32(0)
            store4(groups, i, e, u32(first + begin), left, u32(0))
            i = u32(i + _THREADS)

    return expert_group


def first_group(choices, expert, width):
    """Where the groups of an expert begin, if `choices` are of lower ones.

    There is room: so many choices fill choices / width groups, and each expert that has any begins
    one more.
    """
    return u32(u32(choices // width) + min(choices, expert))


def groups_of(choices: int, experts: int, width: int) -> int:
    """The most groups that `choices` of `experts` can need."""
    return choices // width + min(choices, experts)
