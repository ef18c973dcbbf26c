"""Scores of attention: a tile of 16 rows of q against the 32 keys of a page, in units of ln 2.

q is kept in shared memory as the sum of two words, so that the products are as exact as float32:
of f16 for a cache of f16, of bf16 for all others, whose codes and values bf16 holds exactly (those
of f32 in two words). Lane (g, t) has of the j-th 8 keys in scores[4 j ..]: tokens 8 t + 2 j and + 1
of row g, then of row g + 8.
"""

from __future__ import annotations

from collections.abc import Callable

from runtime.backends.cuda.intrinsics import (
    divide,
    exp2,
    f32,
    fabs,
    fmax,
    i32,
    load4,
    mma_bf16,
    mma_f16,
    registers,
    shared,
    shared_load4,
    shared_store4,
    shuffle_xor,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.cuda.kv_layout import F16, F32, Q8_0, SHARED_PIECES

from .kv_rounding import has_minimum
from .kv_words import group_words, halves_bf16, halves_f16, scales_at, shared_numbers

ROWS = 16  # of a tile
WARPS = 4
LOWEST = f32(-float("inf"))
LOG2_E = f32(1.4426950408889634)


def finite(peak):
    """A row that has seen nothing keeps exponents away from inf - inf."""
    return f32(0) if peak == LOWEST else peak


def row_of(row, tile, part, group):
    """(token, head of the KV head, whether it is one) of row `row` of a tile, or of its last."""
    count = u32(tile[2] * group)
    at = u32(ROWS * part + row)
    live = at < count
    at = at if live else u32(count - 1)
    token = u32(at // group)
    return u32(tile[1] + token), u32(at - u32(token * group)), live


def query_stager(groups: int) -> tuple[Callable, Callable, Callable]:
    """(stage, words, sums): q to shared memory, and what there is of it."""
    word_room, sum_room = shared("u32", groups * 512), shared("f32", groups * ROWS)

    def stage(q, tile, part, kv_head, group, q_stride, q_head_stride, dim, factor, as_f16):
        """q x factor as words: of each group [high, low][row g, row g + 8][lane] 4 words."""
        words, sums = word_room(), sum_room()
        item = thread_x()
        while item < u32(64 * ((dim + 31) >> 5)):
            lane = u32(item & 31)
            row = u32((lane >> 2) + u32(8 * ((item >> 5) & 1)))
            d = u32(u32(32 * (item >> 6)) + 8 * (lane & 3))
            token, head, live = row_of(row, tile, part, group)
            at = u32(u32(token * q_stride) + u32(u32(kv_head * group + head) * q_head_stride) + d)
            a, b = (f32(0), f32(0), f32(0), f32(0)), (f32(0), f32(0), f32(0), f32(0))
            if live and d < dim:
                a = load4(q, u32(at >> 2))
            if live and u32(d + 4) < dim:
                b = load4(q, u32((at >> 2) + 1))
            a0, a1, a2, a3 = a[0] * factor, a[1] * factor, a[2] * factor, a[3] * factor
            b0, b1, b2, b3 = b[0] * factor, b[1] * factor, b[2] * factor, b[3] * factor
            place = u32(u32(128 * (item >> 6)) + 32 * ((item >> 5) & 1) + lane)
            if as_f16:
                w0, w1 = halves_f16(a0, a1), halves_f16(a2, a3)
                w2, w3 = halves_f16(b0, b1), halves_f16(b2, b3)
                shared_store4(words, place, w0[0], w1[0], w2[0], w3[0])
                shared_store4(words, u32(place + 64), w0[1], w1[1], w2[1], w3[1])
            else:
                w0, w1 = halves_bf16(a0, a1), halves_bf16(a2, a3)
                w2, w3 = halves_bf16(b0, b1), halves_bf16(b2, b3)
                shared_store4(words, place, w0[0], w1[0], w2[0], w3[0])
                shared_store4(words, u32(place + 64), w0[1], w1[1], w2[1], w3[1])
            total = ((a0 + a1) + (a2 + a3)) + ((b0 + b1) + (b2 + b3))
            total += shuffle_xor(total, 1)
            total += shuffle_xor(total, 2)
            if lane & 3 == 0:
                sums[u32(u32(ROWS * (item >> 6)) + row)] = total
            item = u32(item + 32 * WARPS)

    def words_of(query, group):
        """A lane's words of a group of dims: 8 high, 8 low; row g, then row g + 8 of each."""
        words = word_room()
        for n in range(4):
            w = shared_load4(words, u32(u32(128 * group) + 32 * n + (thread_x() & 31)))
            for i in range(4):
                query[4 * n + i] = w[i]

    def sums_of(group):
        """Sums of q over a group of dims, of rows g and g + 8."""
        sums = sum_room()
        at = u32(u32(ROWS * group) + ((thread_x() & 31) >> 2))
        return sums[at], sums[u32(at + 8)]

    return stage, words_of, sums_of


def dot_f16(query, at, k, j, d):
    """d + q k^T over 32 dims of the j-th 8 keys, with words of q from `at` on."""
    d = mma_f16(
        query[at], query[at + 4], query[at + 1], query[at + 5], k[4 * j], k[4 * j + 1],
        d[0], d[1], d[2], d[3],
    )  # fmt: skip
    return mma_f16(
        query[at + 2], query[at + 6], query[at + 3], query[at + 7], k[4 * j + 2], k[4 * j + 3],
        d[0], d[1], d[2], d[3],
    )  # fmt: skip


def dot_bf16(query, at, k, j, d):
    """As `dot_f16`."""
    d = mma_bf16(
        query[at], query[at + 4], query[at + 1], query[at + 5], k[4 * j], k[4 * j + 1],
        d[0], d[1], d[2], d[3],
    )  # fmt: skip
    return mma_bf16(
        query[at + 2], query[at + 6], query[at + 3], query[at + 7], k[4 * j + 2], k[4 * j + 3],
        d[0], d[1], d[2], d[3],
    )  # fmt: skip


def _plain_dots(scores, query, k, rest, type):
    """scores += those of a group of values."""
    for j in range(4):
        n = 4 * j
        d = scores[n], scores[n + 1], scores[n + 2], scores[n + 3]
        if type == F16:
            d = dot_f16(query, 0, k, j, d)
            d = dot_f16(query, 8, k, j, d)
        else:
            d = dot_bf16(query, 0, k, j, d)
            d = dot_bf16(query, 8, k, j, d)
            if type == F32:
                d = dot_bf16(query, 0, rest, j, d)
        scores[n], scores[n + 1], scores[n + 2], scores[n + 3] = d


def _coded_dots(scores, query, k, scales):
    """scores += those of a group of codes, each token's by its scale."""
    zero = f32(0)
    for j in range(4):
        d = dot_bf16(query, 0, k, j, (zero, zero, zero, zero))
        d = dot_bf16(query, 8, k, j, d)
        for e in range(4):
            scores[4 * j + e] += d[e] * scales[2 * j + (e & 1)]


def scorer(words_of: Callable, sums_of: Callable) -> Callable:
    """A function: scores of the page whose first group of K is at piece `base`."""
    query_room, k_room, rest_room = registers("u32", 16), registers("u32", 16), registers("u32", 16)
    number_room, fill = registers("f32", 8), group_words(keys=True)

    def score(scores, k, base, dim, type, pieces):
        query, words, rest, numbers = query_room(), k_room(), rest_room(), number_room()
        for n in range(16):
            scores[n] = f32(0)
        group = u32(0)
        while group < u32((dim + 31) >> 5):
            fill(words, rest, k, base, type)
            words_of(query, group)
            if type < Q8_0:
                _plain_dots(scores, query, words, rest, type)
            else:
                at = u32(base + scales_at(type))
                shared_numbers(numbers, k, at)
                _coded_dots(scores, query, words, numbers)
                if has_minimum(type):
                    shared_numbers(numbers, k, u32(at + SHARED_PIECES))
                    low, high = sums_of(group)
                    for j in range(4):
                        for e in range(2):
                            scores[4 * j + e] += low * numbers[2 * j + e]
                            scores[4 * j + 2 + e] += high * numbers[2 * j + e]
            group, base = u32(group + 1), u32(base + pieces)

    return score


def tanh(x):
    """Of any f32, within a few ulp of 1."""
    small = exp2(f32(-2) * LOG2_E * fabs(x))
    value = divide(f32(1) - small, f32(1) + small)
    return value if x >= f32(0) else -value


def cap(scores, most):
    """Scores bounded by `most` tanh(score / most)."""
    for n in range(16):
        scores[n] = most * tanh(divide(scores[n], most))


def seen(score, key, place, window):
    """The score of a key at place `key`, or -inf where a row at `place` does not see it."""
    hidden = key > place or (window > 0 and i32(key + window) <= place)
    return LOWEST if hidden else score


def hide(scores, first, low, high, window):
    """Mask the scores of a page that begins at place `first`; rows at places `low` and `high`."""
    t = u32(thread_x() & 3)
    for j in range(4):
        key = i32(first + 8 * t + 2 * j)
        scores[4 * j] = seen(scores[4 * j], key, low, window)
        scores[4 * j + 1] = seen(scores[4 * j + 1], i32(key + 1), low, window)
        scores[4 * j + 2] = seen(scores[4 * j + 2], key, high, window)
        scores[4 * j + 3] = seen(scores[4 * j + 3], i32(key + 1), high, window)


def row_top(scores, at):
    """The largest score of a row in a page, in the four lanes that share it."""
    top = LOWEST
    for j in range(4):
        top = fmax(top, fmax(scores[4 * j + at], scores[4 * j + at + 1]))
    top = fmax(top, shuffle_xor(top, 1))
    return fmax(top, shuffle_xor(top, 2))


def soften(scores, at, peak):
    """A row's scores become 2^(score - peak); this lane's sum of them."""
    total = f32(0)
    for j in range(4):
        scores[4 * j + at] = exp2(scores[4 * j + at] - finite(peak))
        scores[4 * j + at + 1] = exp2(scores[4 * j + at + 1] - finite(peak))
        total += scores[4 * j + at] + scores[4 * j + at + 1]
    return total
