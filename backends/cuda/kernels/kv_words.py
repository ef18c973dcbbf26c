"""A lane's fragments of a group of the cache as words of two bf16 or f16: 4 parts of 4 words.

Codes become bf16 integers, exactly: below 128 a code is the mantissa of 128 + code. See
`kv_layout.py` for what lies where.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from runtime.backends.cuda.intrinsics import (
    bits_to_f32,
    f16_high,
    f16_low,
    fma_bf16x2,
    load4,
    pack_bf16,
    pack_f16,
    prmt,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.cuda.kv_layout import (
    BIT_PIECES,
    BYTE_PIECES,
    IQ4_NL,
    NIBBLE_PIECES,
    Q4_0,
    Q5_0,
    Q5_1,
    Q6_0,
    Q8_0,
)  # fmt: skip
from runtime.ops.blocks import IQ4_LEVELS

_TABLE = (np.array(IQ4_LEVELS) + 128).astype(np.uint8).view(np.uint32)
_LEVELS0, _LEVELS1, _LEVELS2, _LEVELS3 = map(int, _TABLE)
_ONES = 0x3F803F80


def bf16_low(word):
    """The bf16 in bits 0 to 15."""
    return bits_to_f32(u32(word << 16))


def bf16_high(word):
    """The bf16 in bits 16 to 31."""
    return bits_to_f32(u32(word & 0xFFFF0000))


def halves_bf16(a, b):
    """Two words whose sum is (a, b) to 16 bits."""
    word = pack_bf16(a, b)
    return word, pack_bf16(a - bf16_low(word), b - bf16_high(word))


def halves_f16(a, b):
    """Two words whose sum is (a, b) to 22 bits."""
    word = pack_f16(a, b)
    return word, pack_f16(a - f16_low(word), b - f16_high(word))


def minus(type):
    """Two bf16 that take 128 + code of a type to its value."""
    if type == Q6_0:
        return u32(0xC320C320)
    if type == Q5_0:
        return u32(0xC310C310)
    return u32(0xC308C308) if type == Q4_0 else u32(0xC300C300)


def small(pair, shift):
    """Two codes below 64 in bits 0 to 5 of both halves, which may hold more, as bf16."""
    return fma_bf16x2(u32((pair & 0x003F003F) | 0x43004300), _ONES, shift)


def wide(pair):
    """Two codes below 256, less 128, in the low bytes of both halves, as bf16."""
    low = u32((pair & 0x007F007F) | 0x43004300)
    return fma_bf16x2(low, _ONES, u32((pair & 0x00800080) ^ 0xC380C380))


def levels(word):
    """Levels of the book, plus 128, of the four nibbles in bits 0 to 15: four bytes."""
    selector = u32(word & 0x7777)
    low, high = prmt(_LEVELS0, _LEVELS1, selector), prmt(_LEVELS2, _LEVELS3, selector)
    return prmt(low, high, u32(0x3210 | ((word & 0x8888) >> 1)))


def byte_words(words, source, base):
    """Codes of bytes, of K and V alike."""
    lane = u32(thread_x() & 31)
    for p in range(2):
        w = load4(source, u32(base + 32 * p + lane))
        for q in range(2):
            for m in range(2):
                n = 8 * p + 4 * q + 2 * m
                words[n] = wide(prmt(w[2 * q + m], 0, 0x4140))
                words[n + 1] = wide(prmt(w[2 * q + m], 0, 0x4342))


def _key_bits(bits, source, at, bit):
    """One more bit of the codes of this lane's four tokens, at its place in pairs of K."""
    lane = u32(thread_x() & 31)
    group, t = u32(lane >> 2), u32(lane & 3)
    first = u32(at + 2 * (group >> 1))
    a, b = load4(source, first), load4(source, u32(first + 1))
    odd = u32(group & 1)
    shift = u32(8 * t)
    for j in range(4):
        pair = a if j < 2 else b
        word = pair[2 * (j & 1) + 1] if odd else pair[2 * (j & 1)]
        byte = u32((word >> shift) & 0xFF)
        spread = u32(byte | u32(byte << 15))
        for m in range(4):
            found = u32(u32(u32(spread << 5) >> (2 * m)) >> (5 - bit))
            bits[4 * j + m] = bits[4 * j + m] | u32(found & (0x00010001 << bit))


def key_words(source, base, type, words, bits):
    """Codes of nibbles of K, and of more bits; `bits` of registers like `words`."""
    lane = u32(thread_x() & 31)
    w = load4(source, u32(base + lane))
    if type == IQ4_NL:
        for j in range(4):
            even, odd = levels(w[j]), levels(u32(w[j] >> 16))
            for m in range(4):
                words[4 * j + m] = wide(prmt(even, odd, u32(m | 64 | (4 + m) << 8 | 0x4000)))
    else:
        for n in range(16):
            bits[n] = u32((w[n // 4] >> (4 * (n % 4))) & 0x000F000F)
        if Q6_0 <= type <= Q5_0:
            _key_bits(bits, source, u32(base + NIBBLE_PIECES), 4)
        if type == Q6_0:
            _key_bits(bits, source, u32(base + NIBBLE_PIECES + BIT_PIECES), 5)
        shift = minus(type)
        for n in range(16):
            words[n] = small(bits[n], shift)


def _value_bits(bits, source, at, bit):
    """One more bit of the codes of this lane's eight tokens, at its place in pairs of V."""
    lane = u32(thread_x() & 31)
    group, first = u32(lane >> 2), u32(at + 2 * (lane & 3))
    for half in range(2):
        w = load4(source, u32(first + half))
        for m in range(2):
            a, b = u32((w[2 * m] << bit) >> group), u32((w[2 * m + 1] << bit) >> group)
            for s in range(4):
                n = 4 * s + 2 * half + m
                found = prmt(a, b, u32(s | s << 4 | (4 + s) << 8 | (4 + s) << 12))
                bits[n] = bits[n] | u32(found & (0x00010001 << bit))


def value_words(source, base, type, words, bits):
    """Codes of nibbles of V, and of more bits."""
    lane = u32(thread_x() & 31)
    w = load4(source, u32(base + lane))
    if type == IQ4_NL:
        for n in range(8):
            found = levels(w[n // 2] if n % 2 == 0 else u32(w[n // 2] >> 16))
            at = 8 * (n // 4) + n % 4
            words[at], words[at + 4] = wide(found), wide(u32(found >> 8))
    else:
        for n in range(4):
            low, high = u32(w[n] & 0x0F0F0F0F), u32((w[n] >> 4) & 0x0F0F0F0F)
            at = 8 * (n // 2) + 2 * (n % 2)
            bits[at], bits[at + 1] = prmt(low, 0, 0x4140), prmt(low, 0, 0x4342)
            bits[at + 4], bits[at + 5] = prmt(high, 0, 0x4140), prmt(high, 0, 0x4342)
        if Q6_0 <= type <= Q5_0:
            _value_bits(bits, source, u32(base + NIBBLE_PIECES), 4)
        if type == Q6_0:
            _value_bits(bits, source, u32(base + NIBBLE_PIECES + BIT_PIECES), 5)
        shift = minus(type)
        for n in range(16):
            words[n] = small(bits[n], shift)


def half_words(words, source, base):
    """Values of f16 or bf16."""
    lane = u32(thread_x() & 31)
    for part in range(4):
        w = load4(source, u32(base + 32 * part + lane))
        for m in range(4):
            words[4 * part + m] = w[m]


def float_words(words, rest, source, base):
    """Values of f32 as bf16, and what these leave."""
    lane = u32(thread_x() & 31)
    for part in range(4):
        for half in range(2):
            w = load4(source, u32(base + 64 * part + 32 * half + lane))
            for m in range(2):
                pair = halves_bf16(bits_to_f32(w[2 * m]), bits_to_f32(w[2 * m + 1]))
                words[4 * part + 2 * half + m], rest[4 * part + 2 * half + m] = pair


def group_words(keys: bool) -> Callable:
    """(words, rest, source, base, type): a group of K or V; `rest` is used by f32 and codes."""
    nibbles = key_words if keys else value_words

    def fill(words, rest, source, base, type):
        if type == Q8_0:
            byte_words(words, source, base)
        elif type < Q8_0:
            if type == 0:
                float_words(words, rest, source, base)
            else:
                half_words(words, source, base)
        else:
            nibbles(source, base, type, words, rest)

    return fill


def scales_at(type):
    """Pieces of a group before its scales."""
    if type == Q8_0:
        return u32(BYTE_PIECES)
    if type == Q6_0:
        return u32(NIBBLE_PIECES + 2 * BIT_PIECES)
    if Q5_1 <= type <= Q5_0:
        return u32(NIBBLE_PIECES + BIT_PIECES)
    return u32(NIBBLE_PIECES)


def shared_numbers(numbers, source, at):
    """f16 scales or minima of this lane's eight tokens 8 t .. 8 t + 7, as f32."""
    w = load4(source, u32(at + (thread_x() & 3)))
    for n in range(4):
        numbers[2 * n], numbers[2 * n + 1] = f16_low(w[n]), f16_high(w[n])
