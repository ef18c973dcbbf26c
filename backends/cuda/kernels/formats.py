"""What the weight formats of `layouts.py` mean to a kernel: one `Format` each.

A kernel takes two neighbouring blocks of a row at a time: `fetch` reads their words, and of each
block `total`, `scale` and `minimum` make the numbers of the canonical sum. Words of the first
block come first, then those of the second, then what both share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from runtime.backends.cuda.intrinsics import (
    bits_to_f32,
    constant,
    constant2,
    constant4,
    constant_pair,
    dp2a,
    dp4a,
    dp4a_us,
    f16_high,
    f16_low,
    fma,
    i32,
    int_to_f32,
    prmt,
    shift_right,
    u32,
)  # fmt: skip


class Format(NamedTuple):
    """How kernels read and multiply a format's blocks.

    fetch(raw, at, weights, piece, high, scales, supers, places, pair, block): words of pair `pair`,
    whose first block is `block`, of the row that begins at piece `piece`, to raw[at] and following
    `words`. `high`, `scales`, `supers`: first words of these parts in a row.
    total(raw, at, odd, v, w, sums) -> n; scale(raw, at, odd) -> y; minima 0, 1 or 2 of
    minimum(raw, at, odd, half) -> m. `odd`: 1 for the pair's second block; v, w: the words of the
    activations' halves, and `sums` their negated sums.
    """

    words: int
    fetch: Callable
    total: Callable
    scale: Callable
    minimum: Callable | None = None
    minima: int = 0


def fetch_pieces(raw, at, weights, piece, pair):
    """Two pieces, a block each."""
    a = constant_pair(weights, u32(piece + 2 * pair))
    for n in range(8):
        raw[at + n] = a[n]


def fetch_piece(raw, at, weights, piece):
    """One piece that both blocks share."""
    a = constant4(weights, piece)
    raw[at], raw[at + 1], raw[at + 2], raw[at + 3] = a[0], a[1], a[2], a[3]


def fetch_two(raw, at, weights, word):
    """Two words."""
    a = constant2(weights, u32(word >> 1))
    raw[at], raw[at + 1] = a[0], a[1]


def half_word(weights, word, i):
    """16 bits: number i of those that begin at a word."""
    return u32(constant(weights, u32(word + (i >> 1))) >> u32(16 * (i & 1)))


def byte_of(word, i):
    """Byte i of a word."""
    return u32((word >> u32(8 * i)) & 0xFF)


def signed_byte_of(word, i):
    """Byte i of a word as int8, sign extended."""
    return i32(prmt(word, u32(0), u32(0x8880 + 0x1111 * i)))


def half_of(word, odd):
    """One of the two f16 of a word."""
    return f16_high(word) if odd else f16_low(word)


def dot_nibbles(a, b, c, d, v, w, start):
    """start + the sum of 32 products: low nibbles of four words with `v`, high ones with `w`.

    High nibbles stay in place, 16 times too large, and so does their sum.
    """
    t = dp4a_us(u32(a & 0x0F0F0F0F), v[0], start)
    h = dp4a_us(u32(a & 0xF0F0F0F0), w[0], i32(0))
    t = dp4a_us(u32(b & 0x0F0F0F0F), v[1], t)
    h = dp4a_us(u32(b & 0xF0F0F0F0), w[1], h)
    t = dp4a_us(u32(c & 0x0F0F0F0F), v[2], t)
    h = dp4a_us(u32(c & 0xF0F0F0F0), w[2], h)
    t = dp4a_us(u32(d & 0x0F0F0F0F), v[3], t)
    h = dp4a_us(u32(d & 0xF0F0F0F0), w[3], h)
    return i32(t + shift_right(h, 4))


def dot_words(a, b, c, d, v, start):
    """start + the sum of 16 products of signed bytes."""
    t = dp4a(a, v[0], start)
    t = dp4a(b, v[1], t)
    t = dp4a(c, v[2], t)
    return dp4a(d, v[3], t)


def dot_codes(a, b, c, d, v, start):
    """start + the sum of 16 products of unsigned bytes with signed ones."""
    t = dp4a_us(a, v[0], start)
    t = dp4a_us(b, v[1], t)
    t = dp4a_us(c, v[2], t)
    return dp4a_us(d, v[3], t)


# ---- Q8_0, Q4_0, Q4_1 ---------------------------------------------------------------------------


def _fetch_q8_0(raw, at, weights, piece, high, scales, supers, places, pair, block):
    fetch_pieces(raw, at, weights, piece, pair)
    fetch_pieces(raw, at + 8, weights, u32(piece + places), pair)
    raw[at + 16] = constant(weights, u32(4 * piece + scales + pair))


def _total_q8_0(raw, at, odd, v, w, sums):
    k, m = at + 4 * odd, at + 8 + 4 * odd
    t = dot_words(raw[k], raw[k + 1], raw[k + 2], raw[k + 3], v, i32(0))
    return dot_words(raw[m], raw[m + 1], raw[m + 2], raw[m + 3], w, t)


def _scale_q8_0(raw, at, odd):
    return half_of(raw[at + 16], odd)


def _fetch_q4_0(raw, at, weights, piece, high, scales, supers, places, pair, block):
    fetch_pieces(raw, at, weights, piece, pair)
    raw[at + 8] = constant(weights, u32(4 * piece + scales + pair))


def _total_q4_0(raw, at, odd, v, w, sums):
    k = at + 4 * odd
    start = dp2a(sums, u32(0x0808), i32(0))
    return dot_nibbles(raw[k], raw[k + 1], raw[k + 2], raw[k + 3], v, w, start)


def _scale_q4_0(raw, at, odd):
    return half_of(raw[at + 8], odd)


def _fetch_q4_1(raw, at, weights, piece, high, scales, supers, places, pair, block):
    fetch_pieces(raw, at, weights, piece, pair)
    fetch_two(raw, at + 8, weights, u32(4 * piece + scales + 2 * pair))


def _total_nibbles(raw, at, odd, v, w, sums):
    k = at + 4 * odd
    return dot_nibbles(raw[k], raw[k + 1], raw[k + 2], raw[k + 3], v, w, i32(0))


def _scale_q4_1(raw, at, odd):
    return f16_low(raw[at + 8 + odd])


def _minimum_q4_1(raw, at, odd, half):
    return -f16_high(raw[at + 8 + odd])


# ---- Q5_0, Q5_1, Q5_K: nibbles and a fifth bit --------------------------------------------------


def dot_fifths(a, b, c, d, f, v, w, start):
    """start + the sum of 32 products: nibbles of four words, their fifth bits in `f`."""
    p = u32((a & 0x0F0F0F0F) | (u32(f << 4) & 0x10101010))
    q = u32((b & 0x0F0F0F0F) | (u32(f << 3) & 0x10101010))
    r = u32((c & 0x0F0F0F0F) | (u32(f << 2) & 0x10101010))
    s = u32((d & 0x0F0F0F0F) | (u32(f << 1) & 0x10101010))
    t = dot_codes(p, q, r, s, v, start)
    p = u32((u32(a >> 4) & 0x0F0F0F0F) | (f & 0x10101010))
    q = u32((u32(b >> 4) & 0x0F0F0F0F) | (u32(f >> 1) & 0x10101010))
    r = u32((u32(c >> 4) & 0x0F0F0F0F) | (u32(f >> 2) & 0x10101010))
    s = u32((u32(d >> 4) & 0x0F0F0F0F) | (u32(f >> 3) & 0x10101010))
    return dot_codes(p, q, r, s, w, t)


def _fetch_q5_0(raw, at, weights, piece, high, scales, supers, places, pair, block):
    fetch_pieces(raw, at, weights, piece, pair)
    fetch_two(raw, at + 8, weights, u32(4 * piece + high + 2 * pair))
    raw[at + 10] = constant(weights, u32(4 * piece + scales + pair))


def _total_q5_0(raw, at, odd, v, w, sums):
    k = at + 4 * odd
    start = dp2a(sums, u32(0x1010), i32(0))
    f = raw[at + 8 + odd]
    return dot_fifths(raw[k], raw[k + 1], raw[k + 2], raw[k + 3], f, v, w, start)


def _scale_q5_0(raw, at, odd):
    return half_of(raw[at + 10], odd)


def _fetch_q5_1(raw, at, weights, piece, high, scales, supers, places, pair, block):
    fetch_pieces(raw, at, weights, piece, pair)
    fetch_two(raw, at + 8, weights, u32(4 * piece + high + 2 * pair))
    fetch_two(raw, at + 10, weights, u32(4 * piece + scales + 2 * pair))


def _total_q5_1(raw, at, odd, v, w, sums):
    k = at + 4 * odd
    f = raw[at + 8 + odd]
    return dot_fifths(raw[k], raw[k + 1], raw[k + 2], raw[k + 3], f, v, w, i32(0))


def _scale_q5_1(raw, at, odd):
    return f16_low(raw[at + 10 + odd])


def _minimum_q5_1(raw, at, odd, half):
    return -f16_high(raw[at + 10 + odd])


# ---- Q4_K, Q5_K: bytes of scale and minimum, a super-scale of both ------------------------------


def _fetch_q4_k(raw, at, weights, piece, high, scales, supers, places, pair, block):
    fetch_pieces(raw, at, weights, piece, pair)
    raw[at + 8] = constant(weights, u32(4 * piece + scales + pair))
    raw[at + 9] = constant(weights, u32(4 * piece + supers + (block >> 3)))


def _total_q4_k(raw, at, odd, v, w, sums):
    n = _total_nibbles(raw, at, odd, v, w, sums)
    return i32(n * i32(byte_of(raw[at + 8], 2 * odd)))


def _scale_q4_k(raw, at, odd):
    return f16_low(raw[at + 9])


def _minimum_q4_k(raw, at, odd, half):
    return f16_high(raw[at + 9]) * int_to_f32(i32(byte_of(raw[at + 8], 2 * odd + 1)))


def _fetch_q5_k(raw, at, weights, piece, high, scales, supers, places, pair, block):
    fetch_pieces(raw, at, weights, piece, pair)
    fetch_two(raw, at + 8, weights, u32(4 * piece + high + 2 * pair))
    raw[at + 10] = constant(weights, u32(4 * piece + scales + pair))
    raw[at + 11] = constant(weights, u32(4 * piece + supers + (block >> 3)))


def _total_q5_k(raw, at, odd, v, w, sums):
    return i32(_total_q5_1(raw, at, odd, v, w, sums) * i32(byte_of(raw[at + 10], 2 * odd)))


def _scale_q5_k(raw, at, odd):
    return f16_low(raw[at + 11])


def _minimum_q5_k(raw, at, odd, half):
    return f16_high(raw[at + 11]) * int_to_f32(i32(byte_of(raw[at + 10], 2 * odd + 1)))


# ---- Q6_K, Q3_K, Q2_K: a scale for each half ----------------------------------------------------


def six_bits(word, pairs, w):
    """Four codes of word w of a half: its low nibbles, and bits 4 and 5 from the half's pairs."""
    high = u32(pairs << 4) if w == 0 else u32(pairs << 2) if w == 1 else pairs
    high = u32(pairs >> 2) if w == 3 else high
    return u32((word & 0x0F0F0F0F) | (high & 0x30303030))


def _fetch_q6_k(raw, at, weights, piece, high, scales, supers, places, pair, block):
    fetch_pieces(raw, at, weights, piece, pair)
    fetch_piece(raw, at + 8, weights, u32(piece + (high >> 2) + pair))
    raw[at + 12] = constant(weights, u32(4 * piece + scales + pair))
    raw[at + 13] = half_word(weights, u32(4 * piece + supers), u32(block >> 3))


def _total_q6_k(raw, at, odd, v, w, sums):
    k, p = at + 4 * odd, at + 8 + 2 * odd
    a, b, c, d, f, g = raw[k], raw[k + 1], raw[k + 2], raw[k + 3], raw[p], raw[p + 1]
    start = dp2a(sums, u32(0x0020), i32(0))  # 32 less than each code is meant
    t = dot_codes(
        six_bits(a, f, 0), six_bits(b, f, 1), six_bits(c, f, 2), six_bits(d, f, 3), v, start
    )  # fmt: skip
    start = dp2a(sums, u32(0x2000), i32(0))
    h = dot_codes(
        six_bits(u32(a >> 4), g, 0), six_bits(u32(b >> 4), g, 1), six_bits(u32(c >> 4), g, 2),
        six_bits(u32(d >> 4), g, 3), w, start,
    )  # fmt: skip
    return halves(t, h, raw[at + 12], odd)


def halves(t, h, scales, odd):
    """Sums of a block's halves, each times its int8 scale."""
    first, second = signed_byte_of(scales, 2 * odd), signed_byte_of(scales, 2 * odd + 1)
    return i32(i32(t * first) + i32(h * second))


def _scale_q6_k(raw, at, odd):
    return f16_low(raw[at + 13])


def two_bits(pairs, w):
    """Four codes below 4: word w of a half."""
    return u32((pairs >> u32(2 * w)) & 0x03030303)


def _fetch_q3_k(raw, at, weights, piece, high, scales, supers, places, pair, block):
    fetch_piece(raw, at, weights, u32(piece + pair))
    fetch_two(raw, at + 4, weights, u32(4 * piece + high + 2 * pair))
    raw[at + 6] = constant(weights, u32(4 * piece + scales + pair))
    raw[at + 7] = half_word(weights, u32(4 * piece + supers), u32(block >> 3))


def _total_q3_k(raw, at, odd, v, w, sums):
    f, g, b = raw[at + 2 * odd], raw[at + 2 * odd + 1], raw[at + 4 + odd]
    t = dot_codes(
        u32(two_bits(f, 0) | (u32(b << 2) & 0x04040404)),
        u32(two_bits(f, 1) | (u32(b << 1) & 0x04040404)),
        u32(two_bits(f, 2) | (b & 0x04040404)),
        u32(two_bits(f, 3) | (u32(b >> 1) & 0x04040404)), v, dp2a(sums, u32(0x0004), i32(0)),
    )  # fmt: skip
    h = dot_codes(
        u32(two_bits(g, 0) | (u32(b >> 2) & 0x04040404)),
        u32(two_bits(g, 1) | (u32(b >> 3) & 0x04040404)),
        u32(two_bits(g, 2) | (u32(b >> 4) & 0x04040404)),
        u32(two_bits(g, 3) | (u32(b >> 5) & 0x04040404)), w, dp2a(sums, u32(0x0400), i32(0)),
    )  # fmt: skip
    return halves(t, h, raw[at + 6], odd)


def _scale_q3_k(raw, at, odd):
    return f16_low(raw[at + 7])


def _fetch_q2_k(raw, at, weights, piece, high, scales, supers, places, pair, block):
    fetch_piece(raw, at, weights, u32(piece + pair))
    raw[at + 4] = constant(weights, u32(4 * piece + scales + pair))
    raw[at + 5] = constant(weights, u32(4 * piece + supers + (block >> 3)))


def _total_q2_k(raw, at, odd, v, w, sums):
    f, g = raw[at + 2 * odd], raw[at + 2 * odd + 1]
    t = dot_codes(two_bits(f, 0), two_bits(f, 1), two_bits(f, 2), two_bits(f, 3), v, i32(0))
    h = dot_codes(two_bits(g, 0), two_bits(g, 1), two_bits(g, 2), two_bits(g, 3), w, i32(0))
    first, second = byte_of(raw[at + 4], 2 * odd) & 15, byte_of(raw[at + 4], 2 * odd + 1) & 15
    return i32(i32(t * i32(first)) + i32(h * i32(second)))


def _scale_q2_k(raw, at, odd):
    return f16_low(raw[at + 5])


def _minimum_q2_k(raw, at, odd, half):
    steps = u32(byte_of(raw[at + 4], 2 * odd + half) >> 4)
    return f16_high(raw[at + 5]) * int_to_f32(i32(steps))


# ---- IQ4_NL, IQ4_XS, MXFP4: nibbles name levels -------------------------------------------------


def look_up_in(table: tuple[int, ...]) -> Callable:
    """A function of four nibbles, the low 16 bits of a word, that gives their levels as bytes."""
    T = [int.from_bytes(bytes(n & 255 for n in table[i : i + 4]), "little") for i in (0, 4, 8, 12)]
    T0, T1, T2, T3 = T

    def look_up(nibbles):
        seven = u32(nibbles & 0x7777)
        small, large = prmt(u32(T0), u32(T1), seven), prmt(u32(T2), u32(T3), seven)
        return prmt(small, large, u32(0x3210 | (u32(nibbles >> 1) & 0x4444)))

    return look_up


def _total_levels(table: tuple[int, ...]) -> Callable:
    """The sum of products with the levels that nibbles name in a table."""
    T = [int.from_bytes(bytes(n & 255 for n in table[i : i + 4]), "little") for i in (0, 4, 8, 12)]
    T0, T1, T2, T3 = T

    def levels(sevens, sides):
        """Of four nibbles, the low 16 bits: those of the eight that the low bits name, twice."""
        small, large = prmt(u32(T0), u32(T1), sevens), prmt(u32(T2), u32(T3), sevens)
        return prmt(small, large, sides)

    def total(raw, at, odd, v, w, sums):
        t, h = i32(0), i32(0)
        for n in range(4):
            word = raw[at + 4 * odd + n]
            sevens, sides = u32(word & 0x77777777), u32((word >> 1) & 0x44444444 | 0x32103210)
            t = dp4a(levels(sevens, sides), v[n], t)
            h = dp4a(levels(u32(sevens >> 16), u32(sides >> 16)), w[n], h)
        return i32(t + h)

    return total


def _fetch_iq4_xs(raw, at, weights, piece, high, scales, supers, places, pair, block):
    fetch_pieces(raw, at, weights, piece, pair)
    raw[at + 8] = half_word(weights, u32(4 * piece + scales), pair)
    raw[at + 9] = half_word(weights, u32(4 * piece + supers), u32(block >> 3))


def _scaled_by_a_byte(total: Callable) -> Callable:
    def scaled(raw, at, odd, v, w, sums):
        return i32(total(raw, at, odd, v, w, sums) * signed_byte_of(raw[at + 8], odd))

    return scaled


def _scale_iq4_xs(raw, at, odd):
    return f16_low(raw[at + 9])


def _fetch_mxfp4(raw, at, weights, piece, high, scales, supers, places, pair, block):
    fetch_pieces(raw, at, weights, piece, pair)
    raw[at + 8] = half_word(weights, u32(4 * piece + scales), pair)


def half_e8m0(code):
    """2^(code - 128), below 2^-126 too."""
    return bits_to_f32(u32(u32(code - 1) << 23) if code > 1 else u32(u32(0x200000) << code))


def _scale_mxfp4(raw, at, odd):
    return half_e8m0(byte_of(raw[at + 8], odd))


_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # doubled
_total_iq4, _total_e2m1 = _total_levels(_IQ4), _total_levels(_E2M1)

FORMATS = {
    "Q8_0": Format(17, _fetch_q8_0, _total_q8_0, _scale_q8_0),
    "Q4_0": Format(9, _fetch_q4_0, _total_q4_0, _scale_q4_0),
    "Q4_1": Format(10, _fetch_q4_1, _total_nibbles, _scale_q4_1, _minimum_q4_1, 1),
    "Q5_0": Format(11, _fetch_q5_0, _total_q5_0, _scale_q5_0),
    "Q5_1": Format(12, _fetch_q5_1, _total_q5_1, _scale_q5_1, _minimum_q5_1, 1),
    "Q2_K": Format(6, _fetch_q2_k, _total_q2_k, _scale_q2_k, _minimum_q2_k, 2),
    "Q3_K": Format(8, _fetch_q3_k, _total_q3_k, _scale_q3_k),
    "Q4_K": Format(10, _fetch_q4_k, _total_q4_k, _scale_q4_k, _minimum_q4_k, 1),
    "Q5_K": Format(12, _fetch_q5_k, _total_q5_k, _scale_q5_k, _minimum_q5_k, 1),
    "Q6_K": Format(14, _fetch_q6_k, _total_q6_k, _scale_q6_k),
    "IQ4_NL": Format(9, _fetch_q4_0, _total_iq4, _scale_q4_0),
    "IQ4_XS": Format(10, _fetch_iq4_xs, _scaled_by_a_byte(_total_iq4), _scale_iq4_xs),
    "MXFP4": Format(9, _fetch_mxfp4, _total_e2m1, _scale_mxfp4),
}


def adder(format: str) -> Callable:
    """A function that adds a block's products to a sum, as `layouts.py` says."""
    form = FORMATS[format]
    total, scale, MINIMA = form.total, form.scale, form.minima
    minimum: Any = form.minimum  # called where there are minima

    def add(raw, at, odd, v, w, xs, sums, acc):
        n = total(raw, at, odd, v, w, sums)
        return fma(scale(raw, at, odd) * int_to_f32(n), xs, acc)

    def add_with_minimum(raw, at, odd, v, w, xs, sums, acc):
        acc = add(raw, at, odd, v, w, xs, sums, acc)
        s = xs * int_to_f32(dp2a(sums, u32(0x0101), i32(0)))
        return fma(minimum(raw, at, odd, 0), s, acc)

    def add_with_minima(raw, at, odd, v, w, xs, sums, acc):
        acc = add(raw, at, odd, v, w, xs, sums, acc)
        s = xs * int_to_f32(dp2a(sums, u32(0x0001), i32(0)))
        acc = fma(minimum(raw, at, odd, 0), s, acc)
        s = xs * int_to_f32(dp2a(sums, u32(0x0100), i32(0)))
        return fma(minimum(raw, at, odd, 1), s, acc)

    return (add, add_with_minimum, add_with_minima)[MINIMA]
