"""Sums of attention: O += P V for the pages of a step, a warp a group of 32 dims.

P is one part of a sum in f16 for a cache of f16 (times 2^14: small probabilities stay normal
numbers), in bf16 for the others, the rest in another word. Of codes the scales of tokens go into P,
so the products are those of integers; their minima are summed apart.
"""

from __future__ import annotations

from collections.abc import Callable

from runtime.backends.cuda.intrinsics import (
    f32,
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

_F16_UNIT, F16_PART = f32(1 << 14), f32(1 / (1 << 14))


def probability_room(warps: int) -> tuple[Callable, Callable]:
    """(put, get): P of a page by each warp, 16 numbers a lane, as `attention_scores` has them."""
    room = shared("f32", warps * 512)

    def put(scores, page):
        values, lane = room(), u32(thread_x() & 31)
        for n in range(4):
            shared_store4(
                values, u32(128 * page + 32 * n + lane), scores[4 * n], scores[4 * n + 1],
                scores[4 * n + 2], scores[4 * n + 3],
            )  # fmt: skip

    def get(scores, page):
        values, lane = room(), u32(thread_x() & 31)
        for n in range(4):
            w = shared_load4(values, u32(128 * page + 32 * n + lane))
            for i in range(4):
                scores[4 * n + i] = w[i]

    return put, get


def _halve_f16(p, words):
    """P as words: 8 high ones, 8 low ones; operand A of two mma each."""
    for n in range(8):
        pair = halves_f16(p[2 * n] * _F16_UNIT, p[2 * n + 1] * _F16_UNIT)
        words[n], words[8 + n] = pair


def _halve_bf16(p, words):
    for n in range(8):
        pair = halves_bf16(p[2 * n], p[2 * n + 1])
        words[n], words[8 + n] = pair


def _add_f16(d, p, at, v, s):
    """d + P V of dims 8 s .. of the group, with the words of P from `at` on."""
    d = mma_f16(
        p[at], p[at + 1], p[at + 2], p[at + 3], v[4 * s], v[4 * s + 1], d[0], d[1], d[2], d[3]
    )
    return mma_f16(
        p[at + 4], p[at + 5], p[at + 6], p[at + 7], v[4 * s + 2], v[4 * s + 3],
        d[0], d[1], d[2], d[3],
    )  # fmt: skip


def _add_bf16(d, p, at, v, s):
    d = mma_bf16(
        p[at], p[at + 1], p[at + 2], p[at + 3], v[4 * s], v[4 * s + 1], d[0], d[1], d[2], d[3]
    )
    return mma_bf16(
        p[at + 4], p[at + 5], p[at + 6], p[at + 7], v[4 * s + 2], v[4 * s + 3],
        d[0], d[1], d[2], d[3],
    )  # fmt: skip


def adder() -> Callable:
    """A function: acc[first ..] += P V of the group of V at piece `base`; lift[slot ..] of minima.

    acc of 16: dims 8 s + 2 t and + 1 of row g, then of row g + 8, for s < 4.
    """
    word_room, v_room, rest_room = registers("u32", 16), registers("u32", 16), registers("u32", 16)
    number_room, fill = registers("f32", 8), group_words(keys=False)

    def add(acc, first, lift, slot, p, v, base, type):
        words, numbers, values, rest = word_room(), number_room(), v_room(), rest_room()
        fill(values, rest, v, base, type)
        if type >= Q8_0:
            at = u32(base + scales_at(type))
            if has_minimum(type):
                shared_numbers(numbers, v, u32(at + SHARED_PIECES))
                for n in range(8):
                    i = 4 * (n // 2) + n % 2
                    lift[2 * slot] += p[i] * numbers[n]
                    lift[2 * slot + 1] += p[i + 2] * numbers[n]
            shared_numbers(numbers, v, at)
            for n in range(8):
                i = 4 * (n // 2) + n % 2
                p[i], p[i + 2] = p[i] * numbers[n], p[i + 2] * numbers[n]
        if type == F16:
            _halve_f16(p, words)
        else:
            _halve_bf16(p, words)
        for s in range(4):
            n = first + 4 * s
            d = acc[n], acc[n + 1], acc[n + 2], acc[n + 3]
            if type == F16:
                d = _add_f16(d, words, 0, values, s)
                d = _add_f16(d, words, 8, values, s)
            else:
                d = _add_bf16(d, words, 0, values, s)
                d = _add_bf16(d, words, 8, values, s)
                if type == F32:
                    d = _add_bf16(d, words, 0, rest, s)
            acc[n], acc[n + 1], acc[n + 2], acc[n + 3] = d

    return add


def settle(acc, first, lift, slot, type):
    """acc of a split in its final unit, minima added."""
    low, high = lift[2 * slot], lift[2 * slot + 1]
    low += shuffle_xor(low, 1)
    low += shuffle_xor(low, 2)
    high += shuffle_xor(high, 1)
    high += shuffle_xor(high, 2)
    unit = F16_PART if type == F16 else f32(1)
    for n in range(16):
        acc[first + n] = acc[first + n] * unit + (high if n & 2 else low)
