"""Blocks of any format taken apart in numpy, from its row in `blocks`.

Blocks are structured arrays [n] of `struct_of(row)`; everything found has a first axis n.
"""

from __future__ import annotations

import functools

import numpy as np

from .blocks import Bits, BlockFormat, Chain, Field, Join, Number, Scale, Trits, places_of
from .codebooks import code_book

_STORAGE = {"half_e8m0": "u1", "half_ue4m3": "u1"}
_DELTA = np.float32(0.125)  # what IQ1 shifts the levels of a group by, up or down


@functools.cache
def struct_of(row: BlockFormat) -> np.dtype:
    """The block as a structured type; every field has an axis, also one of a single value."""
    return np.dtype([(f.name, f"<{_kind(f)}", (f.length,)) for f in row.fields.values()])


def _kind(field: Field) -> str:
    return _STORAGE.get(field.kind, field.kind)


def decode(row: BlockFormat, blocks: np.ndarray) -> np.ndarray:
    """Values of blocks, float32 [n, row.block]."""
    values = _spread(np.multiply, scales(row, row.scale, blocks), levels(row, blocks))
    if row.minimum:
        values = _spread(np.add, scales(row, row.minimum, blocks), values)
    return values


def levels(row: BlockFormat, blocks: np.ndarray) -> np.ndarray:
    """Elements before their scale, float32 [n, row.block]: whole numbers, or eighths of IQ1."""
    codes = numbers(row, row.codes, blocks)
    if row.book:
        return _entries(row, code_book(row.book)[codes].reshape(len(blocks), -1), blocks)
    if row.levels:
        return np.array(row.levels, np.float32)[codes]
    found = codes.astype(np.float32)
    return found - np.float32(row.offset) if row.offset else found


def _entries(row: BlockFormat, entries: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Entries of a code book with their signs, or shifted."""
    if row.down:
        delta = np.where(numbers(row, row.down, blocks), -_DELTA, _DELTA)
        return _spread(np.add, delta, entries)
    return entries * (1 - 2 * sign_bits(row, blocks).astype(np.float32))


def sign_bits(row: BlockFormat, blocks: np.ndarray) -> np.ndarray:
    """1 where an element of a code book format is negated, uint8 [n, row.block]."""
    return np.unpackbits(sign_bytes(row, blocks), axis=-1, bitorder="little")


def sign_bytes(row: BlockFormat, blocks: np.ndarray) -> np.ndarray:
    """The sign bits of every eight elements, uint8 [n, row.block / 8]."""
    assert row.signs is not None, "a format with signs"
    found = numbers(row, row.signs, blocks)
    return found.astype(np.uint8) if row.signs.width == 8 else _even_signs()[found]


@functools.cache
def _even_signs() -> np.ndarray:
    """Seven stored sign bits -> eight: the last makes the number of minus signs even."""
    code = np.arange(128, dtype=np.uint8)
    parity = np.bitwise_xor.reduce(np.unpackbits(code[:, None], axis=-1), axis=-1)
    return code | parity << 7


def scales(row: BlockFormat, scale: Scale, blocks: np.ndarray) -> np.ndarray:
    """The scales (or minima) of the groups of a block, float32 [n, groups]."""
    found = _base(row, scale, blocks)
    if scale.steps:
        steps = numbers(row, scale.steps, blocks).astype(np.float32)
        if scale.times != 1 or scale.plus:
            steps = np.float32(scale.times) * steps + np.float32(scale.plus)
        found = found * steps
    return found if scale.unit == 1 else found * np.float32(scale.unit)


def _base(row: BlockFormat, scale: Scale, blocks: np.ndarray) -> np.ndarray:
    if isinstance(scale.base, Bits):
        return pieces(row, scale.base, blocks).astype(np.float32)
    kind, values = row.fields[scale.base].kind, blocks[scale.base]
    return _TABLES[kind]()[values] if kind in _TABLES else values.astype(np.float32)


def pieces(row: BlockFormat, number: Bits, blocks: np.ndarray) -> np.ndarray:
    """Sixteen bits in pieces, joined to a float16 [n, 1]."""
    found = numbers(row, number, blocks).astype(np.uint16)
    shifts = np.arange(found.shape[-1], dtype=np.uint16) * np.uint16(number.width)
    return np.bitwise_or.reduce(found << shifts, axis=-1, keepdims=True).view(np.float16)


@functools.cache
def _half_e8m0() -> np.ndarray:
    """Powers of two, halved."""
    return np.ldexp(np.float32(1), np.arange(256) - 128)


@functools.cache
def _half_ue4m3() -> np.ndarray:
    """Unsigned E4M3 (bias 7; the sign bit is ignored, 0x7f is no number), halved."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    value = np.where(
        exponent == 0, mantissa / 512, (1 + mantissa / 8) * np.exp2(exponent.astype(float) - 7)
    )
    return np.where(np.isin(code, (0, 0x7F)), 0, value / 2).astype(np.float32)


_TABLES = {"half_e8m0": _half_e8m0, "half_ue4m3": _half_ue4m3}


def numbers(row: BlockFormat, number: Number, blocks: np.ndarray) -> np.ndarray:
    """The integers of blocks that `number` describes, [n, count]."""
    match number:
        case Bits():
            return _bits(number, blocks[number.field], places_of(number, row))
        case Trits():
            return _trits(number, blocks[number.field])
        case Chain():
            return np.concatenate([numbers(row, part, blocks) for part in number.parts], axis=-1)
        case Join():
            return _joined(row, number, blocks)


def _bits(number: Bits, field: np.ndarray, places: int) -> np.ndarray:
    words = _words(number, field)
    if number.width == 8 * words.itemsize:
        return words
    if number.run == 1 and places == 8 * words.itemsize == 8:
        return np.unpackbits(words, axis=-1, bitorder="little")
    by_run = words.reshape(len(words), -1, number.run)
    found = np.empty((*by_run.shape[:2], places, number.run), words.dtype)
    for place in range(places):
        shift = number.start + place * (number.step or number.width)
        np.right_shift(by_run, words.dtype.type(shift), out=found[:, :, place])
    found &= words.dtype.type((1 << number.width) - 1)
    return found.reshape(len(words), -1)


def _words(number: Bits | Trits, field: np.ndarray) -> np.ndarray:
    return field[:, slice(*number.words)] if number.words else field


def _trits(number: Trits, field: np.ndarray) -> np.ndarray:
    """A byte is a fraction of 256: digit j is the whole part of 3 * frac(3**j * fraction)."""
    powers = (3 ** np.arange(number.digits)).astype(np.uint8)[:, None]
    digits = (_words(number, field)[:, None] * powers).astype(np.uint16) * 3 >> 8
    return digits.reshape(len(field), -1)


def _joined(row: BlockFormat, number: Join, blocks: np.ndarray) -> np.ndarray:
    kind = np.uint8 if sum(part.width for part in number.parts) <= 8 else np.uint16
    found, place = np.zeros(1, kind), 0
    for part in number.parts:
        piece = numbers(row, part, blocks).astype(kind, copy=False)
        found = np.bitwise_or(found, np.left_shift(piece, kind(place))) if place else piece
        place += part.width
    return found


def _spread(combine: np.ufunc, groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A value for each group, [n, groups], combined with those of its elements [n, elements]."""
    n, count = groups.shape
    if count == 1:
        return combine(groups, values)
    return combine(groups[..., None], values.reshape(n, count, -1)).reshape(n, -1)
