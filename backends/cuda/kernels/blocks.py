"""One element of a block as the file has it, for every format: made from the rows of ops/blocks.py.

What is made are functions of a pointer to bytes, the block's first byte and an element's number;
all of a format's constants are known when they are compiled. Code books come as words of four
int8, see `book_words`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from runtime.backends.cuda.intrinsics import (
    bits_to_f32,
    constant,
    f16_to_f32,
    f32,
    i32,
    int_to_f32,
    u32,
)  # fmt: skip
from runtime.ops.blocks import (
    Bits,
    BlockFormat,
    Chain,
    Field,
    Join,
    Number,
    Scale,
    Trits,
    count_of,
    places_of,
    word_range,
)  # fmt: skip
from runtime.ops.codebooks import code_book

_POWERS_OF_3 = 1 | 3 << 8 | 9 << 16 | 27 << 24


def book_words(name: str) -> np.ndarray:
    """A code book as int32 words of four int8, the first in the low bits; of IQ1 eighths."""
    book = code_book(name)
    whole = book * 8 if name.startswith("iq1") else book
    assert np.array_equal(whole, whole.astype(np.int8)), "levels of a byte"
    return whole.astype(np.int8).reshape(-1).view(np.int32)


def element(row: BlockFormat) -> Callable:
    """(raw u8*, book i32*, first byte of the block, i) -> value i of a block, f32."""
    level, scale = _level(row), _scale(row, row.scale, 1 / 8 if row.down else 1)

    def scaled(raw, book, at, i):
        return scale(raw, at, i) * level(raw, book, at, i)

    if row.minimum is None:
        return scaled
    minimum = _scale(row, row.minimum)

    def shifted(raw, book, at, i):
        return scale(raw, at, i) * level(raw, book, at, i) + minimum(raw, at, i)

    return shifted


def _word(field: Field, nbytes: int) -> Callable:
    """(raw, at, w) -> the low `nbytes` of word w of a field, as u32."""
    offset, size = field.offset, field.nbytes

    def one(raw, at, w):
        return u32(constant(raw, u32(at + offset + w * size)))

    def two(raw, at, w):
        place = u32(at + offset + w * size)
        return u32(u32(constant(raw, place)) | u32(u32(constant(raw, u32(place + 1))) << 8))

    def four(raw, at, w):
        place = u32(at + offset + w * size)
        low = u32(u32(constant(raw, place)) | u32(u32(constant(raw, u32(place + 1))) << 8))
        third, fourth = u32(constant(raw, u32(place + 2))), u32(constant(raw, u32(place + 3)))
        return u32(low | u32(third << 16) | u32(fourth << 24))

    return {1: one, 2: two, 4: four}[nbytes]


def _number(row: BlockFormat, number: Number) -> Callable:
    """(raw, at, i) -> the bits of number i of a block, u32."""
    match number:
        case Bits():
            return _bits(row, number)
        case Trits():
            return _trits(row, number)
        case Join():
            return _join(row, number)
        case Chain():
            return _chain(row, number)


def _bits(row: BlockFormat, number: Bits) -> Callable:
    words, places, run = word_range(number, row), places_of(number, row), number.run
    first, stride = words.start, words.step
    begin, step, mask = number.start, number.step or number.width, (1 << number.width) - 1
    field = row.fields[number.field]
    word = _word(field, field.nbytes)

    def bits(raw, at, i):
        strand = u32(i // run)
        group = u32(strand // places)
        place = u32(strand - u32(group * places))
        which = u32(u32(group * run) + u32(i - u32(strand * run)))
        found = word(raw, at, u32(first + which * stride))
        return u32(u32(found >> u32(begin + place * step)) & mask)

    return bits


def _trits(row: BlockFormat, number: Trits) -> Callable:
    words = word_range(number, row)
    first, count = words.start, len(words)
    word = _word(row.fields[number.field], 1)

    def trits(raw, at, i):
        digit = u32(i // count)
        power = u32(u32(_POWERS_OF_3 >> u32(8 * u32(digit & 3))) & 255)
        if digit == 4:
            power = u32(81)
        fraction = u32(u32(word(raw, at, u32(first + u32(i - u32(digit * count)))) * power) & 255)
        return u32(u32(3 * fraction) >> 8)

    return trits


def _join(row: BlockFormat, number: Join) -> Callable:
    low, *rest = (_number(row, part) for part in number.parts)
    shift = 0
    for part, high in zip(number.parts, rest, strict=False):
        shift += part.width
        low = _joined(low, high, shift)
    return low


def _joined(low: Callable, high: Callable, shift: int) -> Callable:
    def joined(raw, at, i):
        return u32(low(raw, at, i) | u32(high(raw, at, i) << shift))

    return joined


def _chain(row: BlockFormat, number: Chain) -> Callable:
    first, *rest = number.parts
    if not rest:
        return _number(row, first)
    head, tail, count = _number(row, first), _chain(row, Chain(tuple(rest))), count_of(first, row)

    def chain(raw, at, i):
        if i < count:
            return head(raw, at, i)
        return tail(raw, at, u32(i - count))

    return chain


def _signed(row: BlockFormat, number: Number) -> Callable:
    """(raw, at, i) -> number i, i32: negative where its field is signed."""
    found = _number(row, number)
    part = number.parts[0] if isinstance(number, Join | Chain) else number
    signed = isinstance(part, Bits) and row.fields[part.field].kind.startswith("i")
    width = part.width if isinstance(part, Bits) else 2
    shift = 32 - width

    def plain(raw, at, i):
        return i32(found(raw, at, i))

    def extended(raw, at, i):
        return i32(i32(u32(found(raw, at, i) << shift)) >> shift)

    return extended if signed else plain


def _level(row: BlockFormat) -> Callable:
    """(raw, book, at, i) -> level i of a block; of IQ1 in eighths."""
    if row.book:
        return _entry(row)
    code, offset = _signed(row, row.codes), row.offset
    if row.levels:
        return _listed(row)

    def level(raw, book, at, i):
        return int_to_f32(i32(code(raw, at, i) - offset))

    return level


def _listed(row: BlockFormat) -> Callable:
    """Levels of a list of up to 16 int8, held in four words."""
    code = _number(row, row.codes)
    padded = np.array([*row.levels, *[0] * (16 - len(row.levels))], np.int8)
    a, b, c, d = map(int, padded.view(np.uint32))

    def listed(raw, book, at, i):
        found = code(raw, at, i)
        quarter, word = u32(found >> 2), u32(a)
        if quarter == 1:
            word = u32(b)
        if quarter == 2:
            word = u32(c)
        if quarter == 3:
            word = u32(d)
        top = u32(word << u32(24 - 8 * u32(found & 3)))
        return int_to_f32(i32(i32(top) >> 24))

    return listed


def _entry(row: BlockFormat) -> Callable:
    """Levels from a code book, with their signs, or of IQ1 one eighth up or down."""
    code, size = _number(row, row.codes), row.block // count_of(row.codes, row)
    words = size // 4

    def entry(raw, book, at, i):
        number = u32(i // size)
        place = u32(i - u32(number * size))
        word = u32(constant(book, u32(code(raw, at, number) * words + u32(place >> 2))))
        return i32(i32(u32(word << u32(24 - 8 * u32(place & 3)))) >> 24)

    if row.down is None:
        return _negated(row, entry)
    down, each = _number(row, row.down), row.block // count_of(row.down, row)

    def shifted(raw, book, at, i):
        step = i32(1 - 2 * down(raw, at, u32(i // each)))
        return int_to_f32(i32(entry(raw, book, at, i) + step))

    return shifted


def _negated(row: BlockFormat, entry: Callable) -> Callable:
    assert row.signs is not None, "a format with signs"
    signs, even = _number(row, row.signs), row.signs.width == 7

    def negated(raw, book, at, i):
        found, place = signs(raw, at, u32(i >> 3)), u32(i & 7)
        if even and place == 7:  # the number of minus signs is even
            found = u32(found ^ u32(found >> 4))
            found = u32(found ^ u32(found >> 2))
            found = u32(u32(found ^ u32(found >> 1)) << 7)
        value = int_to_f32(entry(raw, book, at, i))
        if u32(found >> place) & 1:
            value = -value
        return value

    return negated


def _scale(row: BlockFormat, scale: Scale, factor: float = 1) -> Callable:
    """(raw, at, i) -> the scale (or minimum) of element i's group, times a power of two."""
    base, bases = _base(row, scale)
    unit = f32(scale.unit * factor)
    each = row.block // bases

    def alone(raw, at, i):
        return base(raw, at, u32(i // each)) * unit

    if scale.steps is None:
        return alone
    steps, group = _signed(row, scale.steps), row.block // count_of(scale.steps, row)
    times, plus = scale.times, scale.plus

    def stepped(raw, at, i):
        step = i32(steps(raw, at, u32(i // group)) * times + plus)
        return (base(raw, at, u32(i // each)) * int_to_f32(step)) * unit

    return stepped


def _base(row: BlockFormat, scale: Scale) -> tuple[Callable, int]:
    """(raw, at, g) -> base g of a scale, f32; and how many a block has."""
    if isinstance(scale.base, Bits):
        pieces, width = _number(row, scale.base), scale.base.width
        count = count_of(scale.base, row)

        def joined(raw, at, g):
            bits = u32(0)
            for piece in range(count):
                bits = u32(bits | u32(pieces(raw, at, u32(piece)) << u32(piece * width)))
            return f16_to_f32(bits)

        return joined, 1
    field = row.fields[scale.base]
    word, value = _word(field, field.nbytes), _FLOATS[field.kind]

    def base(raw, at, g):
        return value(word(raw, at, g))

    return base, field.length


def _half(bits):
    return f16_to_f32(bits)


def _single(bits):
    return bits_to_f32(bits)


def _half_e8m0(code):
    """2^(code - 128), subnormal for codes 0 and 1."""
    bits = u32(u32(code - 1) << 23)
    if code < 2:
        bits = u32(0x00200000 << code)
    return bits_to_f32(bits)


def _half_ue4m3(code):
    """An E4M3 without its sign, halved; 0x7f is 0."""
    exponent, mantissa = u32(u32(code >> 3) & 15), u32(code & 7)
    value = int_to_f32(i32(mantissa)) * f32(2**-10)
    if exponent != 0:
        power = bits_to_f32(u32(u32(exponent + 116) << 23))
        value = int_to_f32(i32(mantissa + 8)) * power
    if code == 0x7F:
        value = f32(0)
    return value


_FLOATS = {"f2": _half, "f4": _single, "half_e8m0": _half_e8m0, "half_ue4m3": _half_ue4m3}
