"""Attention over f16 pages of the cache with a running softmax, the cache split among blocks
(Dao 2022; split KV: Dao et al. 2023).

Grid (splits, KV heads, tiles of rows). A tile is up to 16 rows: the query heads of the KV head of
one or several tokens of a sequence, so a page is read once for all of them. A split is a fixed
number of pages at absolute places; its 4 warps take its pages in turn, and each page is two chains
of f16 mma: scores = Q K^T, then O += P V. `attention_merge` joins the splits. Splits behind the
tile's last place end at once, so one grid serves every length.

Pages lie so that a lane's 16 bytes are its fragments, without shared memory:

    K [page, head, token, dim]    dims 8 t + .. of each 32 are k = 2 t, 2 t + 1, 2 t + 8, 2 t + 9
    V [page, head, dim, token]    of two mma, in Q and K alike; tokens 8 t + 2 j + e of a page are
                                  column 2 t + e of the j-th 8 scores

Every page must be finite everywhere (made of zeros, then written): what a row does not see is
given the probability 0, and 0 times NaN would not be.
"""

from __future__ import annotations

from collections.abc import Callable

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    block_y,
    block_z,
    constant4,
    divide,
    entry,
    exp2,
    f32,
    f32_to_f16,
    fmax,
    grid_x,
    grid_y,
    i32,
    launch_next,
    launch_wait,
    load,
    load2,
    load4,
    mma_f16,
    pack_f16,
    registers,
    shared,
    shuffle_xor,
    store,
    store2,
    syncthreads,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.plan.catalogue import constants
from runtime.ops.kv_formats import PAGE

ROWS = 16  # of a tile
WARPS = 4
SPLIT_PAGES = 8  # of the cache, that a block takes
_DIMS = (32, 64, 128)  # head sizes
_LOWEST = f32(-float("inf"))
_LOG2_E = f32(1.4426950408889634)


def load_query(q, at, live, words, first):
    """8 values of a row as 4 words of f16; zeros for a row that is not there."""
    a, b = load4(q, at), load4(q, u32(at + 1))
    zero = f32(1) if live else f32(0)
    words[first] = pack_f16(a[0] * zero, a[1] * zero)
    words[first + 1] = pack_f16(a[2] * zero, a[3] * zero)
    words[first + 2] = pack_f16(b[0] * zero, b[1] * zero)
    words[first + 3] = pack_f16(b[2] * zero, b[3] * zero)


def seen(score, key, place, window):
    """The score of a key at place `key`, or -inf where a row at `place` does not see it."""
    hidden = key > place or (window > 0 and i32(key + window) <= place)
    return _LOWEST if hidden else score


def finite(peak):
    """A row that has seen nothing keeps exponents away from inf - inf."""
    return f32(0) if peak == _LOWEST else peak


def _scorer(dim: int) -> Callable:
    """scores[4 j + ..] of the j-th 8 keys of a page, in units of ln 2."""

    def score(scores, query, k, base, factor):
        lane = u32(thread_x() & 31)
        group, t = u32(lane >> 2), u32(lane & 3)
        for j in range(4):
            token = u32(8 * (group >> 1) + 2 * j + (group & 1))
            d = f32(0), f32(0), f32(0), f32(0)
            for pair in range(dim // 32):
                w = constant4(k, u32(base + token * (dim // 8) + 4 * pair + t))
                n = 8 * pair
                d = mma_f16(
                    query[n], query[n + 4], query[n + 1], query[n + 5], w[0], w[1],
                    d[0], d[1], d[2], d[3],
                )  # fmt: skip
                d = mma_f16(
                    query[n + 2], query[n + 6], query[n + 3], query[n + 7], w[2], w[3],
                    d[0], d[1], d[2], d[3],
                )  # fmt: skip
            for e in range(4):
                scores[4 * j + e] = d[e] * factor

    return score


def hide(scores, first, low, high, window):
    """Mask the scores of a page that begins at place `first`; rows at places `low` and `high`."""
    t = u32(thread_x() & 3)
    for j in range(4):
        key = i32(first + 8 * t + 2 * j)
        scores[4 * j] = seen(scores[4 * j], key, low, window)
        scores[4 * j + 1] = seen(scores[4 * j + 1], i32(key + 1), low, window)
        scores[4 * j + 2] = seen(scores[4 * j + 2], key, high, window)
        scores[4 * j + 3] = seen(scores[4 * j + 3], i32(key + 1), high, window)


def soften(scores, at, peak):
    """The new peak of a row, whose scores become 2^(score - peak), and this lane's sum of them."""
    top = peak
    for j in range(4):
        top = fmax(top, fmax(scores[4 * j + at], scores[4 * j + at + 1]))
    top = fmax(top, shuffle_xor(top, 1))
    top = fmax(top, shuffle_xor(top, 2))
    total = f32(0)
    for j in range(4):
        scores[4 * j + at] = exp2(scores[4 * j + at] - finite(top))
        scores[4 * j + at + 1] = exp2(scores[4 * j + at + 1] - finite(top))
        total += scores[4 * j + at] + scores[4 * j + at + 1]
    return top, total


def _summer(dim: int) -> Callable:
    """O = decay O + P V of a page."""

    def add(acc, scores, v, base, low, high):
        lane = u32(thread_x() & 31)
        place = u32(base + 4 * (lane >> 2) + (lane & 3))
        a0, a1 = pack_f16(scores[0], scores[1]), pack_f16(scores[2], scores[3])
        a2, a3 = pack_f16(scores[4], scores[5]), pack_f16(scores[6], scores[7])
        b0, b1 = pack_f16(scores[8], scores[9]), pack_f16(scores[10], scores[11])
        b2, b3 = pack_f16(scores[12], scores[13]), pack_f16(scores[14], scores[15])
        for n in range(dim // 8):
            w = constant4(v, u32(place + 32 * n))
            c = 4 * n
            d = mma_f16(
                a0, a1, a2, a3, w[0], w[1],
                acc[c] * low, acc[c + 1] * low, acc[c + 2] * high, acc[c + 3] * high,
            )  # fmt: skip
            d = mma_f16(b0, b1, b2, b3, w[2], w[3], d[0], d[1], d[2], d[3])
            acc[c], acc[c + 1], acc[c + 2], acc[c + 3] = d[0], d[1], d[2], d[3]

    return add


def _joiner(dim: int) -> Callable:
    """Join the warps of a block: rows' peaks, sums and O to `partial` and `stats` of the split."""
    warp_acc, warp_stats = shared("f32", WARPS * ROWS * dim), shared("f32", WARPS * ROWS * 2)

    def join(acc, low, low_sum, high, high_sum, partial, stats, place):
        values, numbers = warp_acc(), warp_stats()
        warp, lane = u32(thread_x() >> 5), u32(thread_x() & 31)
        row, t = u32(ROWS * warp + (lane >> 2)), u32(lane & 3)
        for n in range(dim // 8):
            for e in range(4):
                cell = u32((row + 8 * (e // 2)) * dim + 8 * n + 2 * t + e % 2)
                values[cell] = acc[4 * n + e]
        if t == 0:
            numbers[u32(2 * row)], numbers[u32(2 * row + 1)] = low, low_sum
            numbers[u32(2 * row + 16)], numbers[u32(2 * row + 17)] = high, high_sum
        syncthreads()
        for i in range(ROWS * dim // (32 * WARPS)):
            cell = u32(32 * WARPS * i + thread_x())
            r, peak = u32(cell // dim), _LOWEST
            for w in range(WARPS):
                peak = fmax(peak, numbers[u32(2 * (ROWS * w + r))])
            total, value = f32(0), f32(0)
            for w in range(WARPS):
                at = u32(2 * (ROWS * w + r))
                factor = exp2(numbers[at] - finite(peak))
                total += factor * numbers[u32(at + 1)]
                value += factor * values[u32(w * ROWS * dim + cell)]
            store(partial, u32(place * (ROWS * dim) + cell), value)
            if cell % dim == 0:
                store2(stats, u32(place * ROWS + r), peak, total)

    return join


def _walker(dim: int) -> Callable:
    """Take pages `page`, `page` + 4, .. before `end`; (peak, sum) of rows `lane / 4` and + 8."""
    scores_of = registers("f32", 16)
    score, add = _scorer(dim), _summer(dim)

    def walk(acc, query, k, v, block_table, at, page, end, low_place, high_place, factor, window):
        scores = scores_of()
        low, high, low_sum, high_sum = _LOWEST, _LOWEST, f32(0), f32(0)
        while page < end:
            where = load(block_table, u32(at + page))
            base = u32(u32(where * grid_y() + block_y()) * (PAGE * dim // 8))
            score(scores, query, k, base, factor)
            hide(scores, u32(page * PAGE), low_place, high_place, window)
            new_low, low_part = soften(scores, 0, low)
            new_high, high_part = soften(scores, 2, high)
            decay, other = exp2(low - finite(new_low)), exp2(high - finite(new_high))
            low_sum, high_sum = low_sum * decay + low_part, high_sum * other + high_part
            low, high = new_low, new_high
            add(acc, scores, v, base, decay, other)
            page = u32(page + WARPS)
        low_sum += shuffle_xor(low_sum, 1)
        low_sum += shuffle_xor(low_sum, 2)
        high_sum += shuffle_xor(high_sum, 1)
        high_sum += shuffle_xor(high_sum, 2)
        return low, low_sum, high, high_sum

    return walk


def _loader(dim: int) -> Callable:
    """The fragments of this lane's two rows, and the places up to which they see."""

    def load_row(query, first, row, q, places, tile, q_stride, group):
        live = row < tile[2] * group
        row = u32(min(row, u32(tile[2] * group - 1)))
        token = u32(tile[1] + row // group)
        at = u32(u32(token * q_stride + (block_y() * group + row % group) * dim) >> 2)
        for pair in range(dim // 32):
            offset = u32(8 * pair + 2 * (thread_x() & 3))
            load_query(q, u32(at + offset), live, query, 8 * pair + first)
        return load(places, token)

    return load_row


@constants(dim=_DIMS)
def build_attention(dim: int) -> Declared:
    """Each split's part: partial f32 [tile, KV head, split, 16, dim], stats [.., 16, 2].

    q f32 [tokens, heads, dim], row stride `q_stride`; `group` query heads per KV head, 16 at most.
    tiles u32 [tile, 4]: sequence, first token, tokens (tokens x group <= 16). places i32 [tokens],
    ascending in a tile; `block_table` u32 [sequence, block_table_stride]; a split is `split_pages`
    pages. `factor` = scale / ln 2; `window` > 0: only the last `window` places.
    """
    queries, sums = registers("u32", dim // 4), registers("f32", dim // 2)
    load_row, walk, join = _loader(dim), _walker(dim), _joiner(dim)

    @entry(
        "q:f32* k:u32* v:u32* block_table:u32* tiles:u32* places:i32* partial:f32* stats:f32* "
        "q_stride:u32 block_table_stride:u32 group:u32 split_pages:u32 factor:f32 window:i32",
        threads=32 * WARPS,
        min_blocks=2,
    )
    def attention(
        q, k, v, block_table, tiles, places, partial, stats, q_stride, block_table_stride, group,
        split_pages, factor, window,
    ):  # fmt: skip
        launch_next()
        row, query, acc = u32((thread_x() & 31) >> 2), queries(), sums()
        launch_wait()
        tile = load4(tiles, block_z())
        page = u32(block_x() * split_pages)
        end = page
        if tile[2]:
            last = u32(load(places, u32(tile[1] + tile[2] - 1)))
            end = u32(min(u32(page + split_pages), u32((last >> 5) + 1)))
        if page < end:
            low_place = load_row(query, 0, row, q, places, tile, q_stride, group)
            high_place = load_row(query, 4, u32(row + 8), q, places, tile, q_stride, group)
            for n in range(dim // 2):
                acc[n] = f32(0)
            low, low_sum, high, high_sum = walk(
                acc, query, k, v, block_table, u32(tile[0] * block_table_stride),
                u32(page + (thread_x() >> 5)), end, low_place, high_place, factor, window,
            )  # fmt: skip
            place = u32(u32(u32(block_z() * grid_y()) + block_y()) * grid_x() + block_x())
            join(acc, low, low_sum, high, high_sum, partial, stats, place)

    return attention


@constants(dim=_DIMS)
def build_attention_merge(dim: int) -> Declared:
    """out f32 [tokens, heads, dim] (row stride `out_stride`) of the splits' parts.

    Grid (16 rows, KV heads, tiles), a thread per value. `sinks` f32 [heads]: one more logit of
    each head in its sum, where `has_sinks` is not 0.
    """

    @entry(
        "partial:f32* stats:f32* tiles:u32* places:i32* sinks:f32* out:f32* splits:u32 "
        "out_stride:u32 group:u32 split_pages:u32 has_sinks:u32",
        threads=dim,
    )
    def attention_merge(
        partial, stats, tiles, places, sinks, out, splits, out_stride, group, split_pages, has_sinks
    ):  # fmt: skip
        launch_next()
        row = block_x()
        launch_wait()
        tile = load4(tiles, block_z())
        if row < tile[2] * group:
            token, head = u32(tile[1] + row // group), u32(block_y() * group + row % group)
            last = u32(load(places, u32(tile[1] + tile[2] - 1)))
            used = u32(((last >> 5) + split_pages) // split_pages)
            first = u32(u32(block_z() * grid_y() + block_y()) * splits)
            peak, total, value = _LOWEST, f32(0), f32(0)
            if has_sinks:
                peak, total = load(sinks, head) * _LOG2_E, f32(1)
            for split in range(used):
                at = u32(u32(first + split) * ROWS + row)
                top, part = load2(stats, at)
                new = fmax(peak, top)
                old_factor, factor = exp2(peak - finite(new)), exp2(top - finite(new))
                total = total * old_factor + part * factor
                value = value * old_factor + load(partial, u32(at * dim + thread_x())) * factor
                peak = new
            place = u32(u32(token * out_stride) + u32(head * dim + thread_x()))
            store(out, place, divide(value, total))

    return attention_merge


@constants(which=("k", "v"), dim=_DIMS)
def build_kv_write(which: str, dim: int) -> Declared:
    """Rows of k or v, x f32 [tokens, KV heads, dim] (row stride `x_stride`), to their KV kv_slots.

    `kv_slots` i32 [tokens]: page x 32 + token of the page. Grid (KV heads, tokens).
    """

    @entry("x:f32* pages:u16* kv_slots:i32* live:u32* x_stride:u32", threads=dim)
    def kv_write(x, pages, kv_slots, live, x_stride):
        launch_next()
        i = thread_x()
        launch_wait()
        if block_y() < load(live, u32(0)):
            slot = u32(load(kv_slots, block_y()))
            value = load(x, u32(u32(block_y() * x_stride) + u32(block_x() * dim + i)))
            base = u32(u32((slot >> 5) * grid_x() + block_x()) * (PAGE * dim))
            inside = u32((slot & 31) * dim + i) if which == "k" else u32(i * PAGE + (slot & 31))
            store(pages, u32(base + inside), f32_to_f16(value))

    return kv_write
