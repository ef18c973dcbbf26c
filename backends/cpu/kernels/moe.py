"""Mixture of experts around the expert matmuls: choice, weights, tiles and the weighted sum.

Choosing is parallel over tokens: rank after rank is the best score behind the one before it in
one order (larger first, then lower index), found in a pass over the scores, so nothing is stored.
`expert_group` is a counting sort by one thread; `expert_sum` is parallel over units of a row, of
all tokens alike, as the rows of the matmuls before it.
"""

from __future__ import annotations

from runtime.backends.cpu.tile.spec import COLUMNS
from runtime.backends.plan.catalogue import constants

from . import emit as e
from . import simd as s
from .elementwise import exp_sum, get, put, row_sum
from .rows import helper, piece, share, share_of_row

_NOTHING, _NAN = -(2**31), float("nan")
_FIRST = (2**31 - 1) << 32  # before every place: a key above all, and the lowest index


@s.operation(s.i32x16, s.f32x16)
def keys(b, x):
    """int32 in the order of float32: NaN lowest, both zeros equal, above -2^31 + 1 otherwise."""
    bits = b.bitcast(b.fadd(x, e.floats(0.0)), e.wide(e.i32))
    ordered = b.xor(bits, b.and_(b.ashr(bits, e.ints(31)), e.ints(0x7FFFFFFF)))
    return b.select(b.fcmp_ordered("==", x, x), ordered, e.ints(_NOTHING + 1))


@s.operation(s.i64, s.i32x16, s.i32x16)
def first_place(b, key, index):
    """The place key * 2^32 + (2^31 - 1 - index) that is the largest of 16."""
    wide = e.wide(e.i64)
    high = b.shl(b.sext(key, wide), e.ints(32, e.i64))
    low = b.sub(e.ints(2**31 - 1, e.i64), b.sext(index, wide))
    places = b.add(high, low)
    return e.halves(b, places, lambda x, y: b.select(b.icmp_signed(">", x, y), x, y))


@helper
def index_of(place):
    """The index in a place: its low half counts down from 2^31 - 1."""
    return (2**31 - 1) - (place & 0xFFFFFFFF)


@helper
def next_place(x, n, place):
    """The best of n scores behind `place`; NaN is the worst, ties go to the lowest index."""
    last_key, last_index = s.splat_int(place >> 32), s.splat_int(index_of(place))
    nothing, best = s.splat_int(_NOTHING), s.splat_int(_NOTHING)
    where = s.splat_int(0)
    for i in range(0, n, 16):
        # Lanes beyond the row are NaN with an index above all others: behind every score.
        key, index = keys(get(x, i, n, _NAN)), s.lane_numbers() + s.splat_int(i)
        behind = (key < last_key) | ((key == last_key) & (index > last_index))
        key = s.select_ints(behind, key, nothing)
        better = key > best
        best = s.select_ints(better, key, best)
        where = s.select_ints(better, index, where)
    return first_place(best, where)


@helper
def choose(x, ids, n, k):
    """The k best of n scores, best first, as int32."""
    place = _FIRST
    for rank in range(k):
        place = next_place(x, n, place)
        s.store_i32(ids + rank * 4, index_of(place))


@helper
def chosen(x, ids, rank):
    """The score of the expert at a rank."""
    return s.load_f32(x + s.load_i32(ids + rank * 4) * 4)


def build_top_k():
    """The ids of the k largest of a row, largest first, int32: parallel over rows."""

    def top_k(x, out, live, n, k, x_stride, thread, n_threads):
        first, last = share(s.load_i64(live), thread, n_threads)
        for row in range(first, last):
            choose(x + row * x_stride * 4, out + row * k * 4, n, k)

    return top_k


def build_take():
    """out[i, j] = x[i, ids[i, j]]: parallel over rows."""

    def take(x, ids, out, live, k, x_stride, thread, n_threads):
        first, last = share(s.load_i64(live), thread, n_threads)
        for row in range(first, last):
            for rank in range(k):
                value = chosen(x + row * x_stride * 4, ids + row * k * 4, rank)
                s.store_f32(out + (row * k + rank) * 4, value)

    return take


@helper
def number_of(numbers, ids, i):
    """The own number of the i-th of some ids, -1 for an expert of another device."""
    return s.load_i32(numbers + s.load_i32(ids + i * 4) * 4)


def build_renumber():
    """out[i, j] = numbers[ids[i, j]]: parallel over rows of k ids."""

    def renumber(ids, numbers, out, live, k, thread, n_threads):
        first, last = share(s.load_i64(live), thread, n_threads)
        for i in range(first * k, last * k):
            s.store_i32(out + i * 4, number_of(numbers, ids, i))

    return renumber


@helper
def divide(weights, k, whole):
    """The k weights of a token by a number."""
    for rank in range(k):
        s.store_f32(weights + rank * 4, s.load_f32(weights + rank * 4) / whole)


def _scores(scoring):
    """(logits, ids, weights, n, k): the scores of the chosen experts from their logits."""

    @helper
    def exponentials(x, ids, weights, k):
        peak = chosen(x, ids, 0)
        for rank in range(k):
            s.store_f32(weights + rank * 4, s.exp_f32(chosen(x, ids, rank) - peak))
        return peak

    @helper
    def softmax(x, ids, weights, n, k):
        peak = exponentials(x, ids, weights, k)
        divide(weights, k, exp_sum(x, n, peak))

    @helper
    def softmax_topk(x, ids, weights, n, k):
        exponentials(x, ids, weights, k)
        divide(weights, k, row_sum(weights, k))

    @helper
    def sigmoid(x, ids, weights, n, k):
        for rank in range(k):
            value = s.f32(1) / (s.f32(1) + s.exp_f32(-chosen(x, ids, rank)))
            s.store_f32(weights + rank * 4, value)

    return {"softmax": softmax, "sigmoid": sigmoid, "softmax_topk": softmax_topk}[scoring]


@constants(scoring=("softmax", "sigmoid", "softmax_topk"), normalize=(False, True))
def build_router(scoring, normalize):
    """Experts are chosen by logit: different logits can have equal scores in float32.

    The weights have the bits of the kernels softmax (or sigmoid), take, normalize and scale.
    With `tiles` not 0 every choice is a tile of one column, in order: [expert, output row]. With
    `numbers` not 0 `own` are the numbers of the chosen, see renumber, and there is one row at most,
    of which those below 0 are no tiles.
    """
    score = _scores(scoring)

    @helper
    def one_tile_each(tiles, ids, first, k):
        for i in range(first, first + k):
            s.store_i32(tiles + i * 8, s.load_i32(ids + i * 4))
            s.store_i32(tiles + i * 8 + 4, i)

    @helper
    def tiles_of_own(tiles, n_tiles, own, k):
        n = 0
        for i in range(k):
            if s.load_i32(own + i * 4) >= 0:
                s.store_i32(tiles + n * 8, s.load_i32(own + i * 4))
                s.store_i32(tiles + n * 8 + 4, i)
                n += 1
        s.store_i64(n_tiles, n)

    def router(
        logits, ids, weights, tiles, n_tiles, numbers, own, live, n_experts, k, logits_stride,
        scale, thread, n_threads,
    ):  # fmt: skip
        factor = s.float_of(scale)
        if tiles != 0 and thread == 0 and (numbers == 0 or s.load_i64(live) == 0):
            s.store_i64(n_tiles, s.load_i64(live) * k)
        first, last = share(s.load_i64(live), thread, n_threads)
        for row in range(first, last):
            x = logits + row * logits_stride * 4
            best, parts = ids + row * k * 4, weights + row * k * 4
            choose(x, best, n_experts, k)
            score(x, best, parts, n_experts, k)
            if normalize:
                divide(parts, k, row_sum(parts, k))
            for rank in range(k):
                s.store_f32(parts + rank * 4, s.load_f32(parts + rank * 4) * factor)
            if numbers != 0:
                for i in range(row * k, row * k + k):
                    s.store_i32(own + i * 4, number_of(numbers, ids, i))
            if tiles != 0 and numbers != 0:
                tiles_of_own(tiles, n_tiles, own, k)
            elif tiles != 0:
                one_tile_each(tiles, ids, row * k, k)

    return router


@constants(C=COLUMNS)
def build_expert_group(C):
    """Choices sorted by expert into tiles of C rows, [expert, row or -1 x C]: one thread.

    Those below 0 are left out.
    """
    record = 4 * (1 + C)

    @helper
    def count(ids, n, n_experts, counters):
        for expert in range(n_experts):
            s.store_i64(counters + expert * 8, 0)
        for row in range(n):
            expert = s.load_i32(ids + row * 4)
            if expert >= 0:
                s.store_i64(counters + expert * 8, s.load_i64(counters + expert * 8) + 1)

    @helper
    def place(counters, n_experts):
        """Counts become the first slot (C to a tile) of each expert; returns the tiles."""
        n_tiles = 0
        for expert in range(n_experts):
            needed = (s.load_i64(counters + expert * 8) + (C - 1)) // C
            s.store_i64(counters + expert * 8, n_tiles * C)
            n_tiles += needed
        return n_tiles

    @helper
    def fill(ids, tiles, n, counters):
        for row in range(n):
            expert = s.load_i32(ids + row * 4)
            if expert < 0:
                continue
            slot = s.load_i64(counters + expert * 8)
            tile, column = tiles + slot // C * record, slot % C
            if column == 0:
                s.store_i32(tile, expert)
            s.store_i32(tile + 4 + column * 4, row)
            s.store_i64(counters + expert * 8, slot + 1)

    @helper
    def pad(tiles, counters, n_experts):
        for expert in range(n_experts):
            slot = s.load_i64(counters + expert * 8)
            while slot % C != 0:
                s.store_i32(tiles + slot // C * record + 4 + slot % C * 4, -1)
                slot += 1

    def expert_group(ids, tiles, n_tiles, live, n_experts, k, scratch, thread, n_threads):
        if thread == 0:
            n = s.load_i64(live) * k
            count(ids, n, n_experts, scratch)
            s.store_i64(n_tiles, place(scratch, n_experts))
            fill(ids, tiles, n, scratch)
            pad(tiles, scratch, n_experts)

    return expert_group


def build_expert_bias():
    """y[i] + bias[ids[i]], of ids below 0 with any bias: parallel over (row x 16 elements)."""

    def expert_bias(y, bias, ids, out, live, n, y_stride, out_stride, thread, n_threads):
        units = (n + 15) // 16
        at, last = share(s.load_i64(live) * units, thread, n_threads)
        while at < last:
            row, first, stop = piece(at, last, units)
            own = bias + max(s.load_i32(ids + row * 4), 0) * n * 4
            for unit in range(first, stop):
                i = unit * 16
                value = get(y + row * y_stride * 4, i, n, 0) + get(own, i, n, 0)
                put(out + row * out_stride * 4, i, n, value)
            at += stop - first

    return expert_bias


def build_expert_sum():
    """Terms in order: experts by rank, `shared` times sigmoid of its `gate`, `add`; 0: without.

    Of experts those with ids below 0 are left out.
    """

    @helper
    def weighted(y, weights, i, n, k):
        value = get(y, i, n, 0) * s.splat(s.load_f32(weights))
        for rank in range(1, k):
            weight = s.splat(s.load_f32(weights + rank * 4))
            value = s.fma(get(y + rank * n * 4, i, n, 0), weight, value)
        return value

    @helper
    def weighted_own(y, weights, ids, i, n, k):
        value = s.splat(0)
        for rank in range(k):
            if s.load_i32(ids + rank * 4) >= 0:
                weight = s.splat(s.load_f32(weights + rank * 4))
                value = s.fma(get(y + rank * n * 4, i, n, 0), weight, value)
        return value

    def expert_sum(
        y, weights, ids, shared, gate, add, out, live, n, k, shared_stride, gate_stride, add_stride,
        out_stride, thread, n_threads,
    ):  # fmt: skip
        first, last = share_of_row(n, thread, n_threads)
        for row in range(s.load_i64(live)):
            factor = s.f32(1)
            if gate != 0:
                opening = s.load_f32(gate + row * gate_stride * 4)
                factor = s.f32(1) / (s.f32(1) + s.exp_f32(-opening))
            for i in range(first, last, 16):
                rows, parts = y + row * k * n * 4, weights + row * k * 4
                if ids == 0:
                    value = weighted(rows, parts, i, n, k)
                else:
                    value = weighted_own(rows, parts, ids + row * k * 4, i, n, k)
                if shared != 0:
                    extra = get(shared + row * shared_stride * 4, i, n, 0)
                    value = value + extra * s.splat(factor)
                if add != 0:
                    value = value + get(add + row * add_stride * 4, i, n, 0)
                put(out + row * out_stride * 4, i, n, value)

    return expert_sum
