"""Codes of sixteen blocks to their bytes, as the row of their format in ops/blocks.py says.

Codes, steps of scales and of minima, and the fields these are multiplied with are vectors of
int32, lane i for block i, one behind the other at an address each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from llvmlite import ir
from numba.core import cgutils

from runtime.ops.blocks import (
    BLOCK_FORMATS,
    Bits,
    Chain,
    Join,
    Number,
    Scale,
    Trits,
    count_of,
    place_of,
)

from . import emit as e
from . import simd as s

_CHUNK = 4  # bytes put together in a vector


class _Part(NamedTuple):
    """`width` bits, from bit `low` on, of vector `i` at an address; they go to bit `at`.

    weight: a digit of base 3 instead, which counts that much of 243 in a byte. plus: what the
    number kept has less than the vector.
    """

    address: int
    i: int
    low: int
    width: int
    at: int
    weight: int = 0
    plus: int = 0


def packer(name):
    """(codes, steps, minima, bases, out, n): n blocks of the format, behind one another, to `out`.

    codes count from the lowest; steps, minima: those of the scales and minima of the parts, where
    a format has signs or directions these in place of minima; bases: the floats of the scale, then
    those of the minimum, as bits. Addresses of what the format does not have are not read.
    """
    row = BLOCK_FORMATS[name]
    places = [part for address, kind in enumerate(_numbers(row)) for part in kind]

    @s.operation(s.void, s.i64, s.i64, s.i64, s.i64, s.i64, s.i64)
    def pack(b, codes, steps, minima, bases, out, n):
        addresses = codes, steps, minima, bases
        with b.goto_entry_block():
            made = b.alloca(ir.ArrayType(e.i8, e.LANES * row.nbytes))
        start = b.ptrtoint(made, e.i64)
        for first in range(0, row.nbytes, _CHUNK):
            count = min(_CHUNK, row.nbytes - first)
            value = _chunk(b, addresses, places, first, count)
            for lane in range(e.LANES):
                one = b.extract_element(value, ir.Constant(e.i32, lane))
                _put(b, one, e.offset(b, start, lane * row.nbytes + first), count)
        to = e.pointer(b, out, e.i8)
        cgutils.raw_memcpy(b, to, b.bitcast(made, to.type), b.mul(n, e.number(row.nbytes)), 1)

    return pack


def _put(b, word, address, count):
    at = 0
    for nbytes, kind in ((4, e.i32), (2, e.i16), (1, e.i8)):
        if count & nbytes:
            piece = b.lshr(word, ir.Constant(e.i32, 8 * at)) if at else word
            e.store(b, b.trunc(piece, kind) if nbytes < 4 else piece, e.offset(b, address, at), 1)
            at += nbytes


def _chunk(b, addresses, places, first, count):
    """`count` bytes from byte `first` on, in every lane."""
    value, end = e.ints(0), 8 * (first + count)
    for byte in range(first, first + count):
        digits = [part for part in places if part.weight and part.at == 8 * byte]
        if digits:
            value = b.or_(value, b.shl(_trits(b, addresses, digits), e.ints(8 * (byte - first))))
    for part in places:
        start, stop = max(part.at, 8 * first), min(part.at + part.width, end)
        if start < stop and not part.weight:
            low = part.low + start - part.at
            bits = _vector(b, addresses, part)
            bits = b.and_(
                b.lshr(bits, e.ints(low)) if low else bits, e.ints((1 << stop - start) - 1)
            )
            value = b.or_(value, b.shl(bits, e.ints(start - 8 * first)))
    return value


def _vector(b, addresses, part):
    at = e.offset(b, addresses[part.address], 64 * part.i)
    value = e.load(b, at, e.wide(e.i32), 64)
    return b.sub(value, e.ints(part.plus)) if part.plus else value


def _trits(b, addresses, digits):
    """A byte that is that fraction of 256 of which the digits are, rounded up."""
    total = e.ints(242)
    for part in digits:
        total = b.add(total, b.mul(_vector(b, addresses, part), e.ints(256 * part.weight)))
    return b.udiv(total, e.ints(243))


def _numbers(row) -> Iterator[list[_Part]]:
    """Parts of the codes, the steps of scales, those of minima (or signs), the bases of both."""
    scales = [scale for scale in (row.scale, row.minimum) if scale]
    yield _parts(row, row.codes, 0)
    for address, scale in enumerate((row.scale, row.minimum), 1):
        steps = _parts(row, scale.steps, address) if scale and scale.steps else []
        extra = row.signs or row.down if address == 2 else None
        steps += _parts(row, extra, address) if extra else []
        yield [part._replace(plus=scale.plus) for part in steps] if scale else steps
    bases: list[_Part] = []
    for scale in scales:
        bases += _base(row, scale, len(bases))
    yield bases


def _base(row, scale: Scale, first: int) -> list[_Part]:
    if isinstance(scale.base, Bits):
        parts = enumerate(_parts(row, scale.base, 3))
        return [part._replace(i=first, low=part.width * k) for k, part in parts]
    field = row.fields[scale.base]
    width = 8 * field.nbytes
    return [
        _Part(3, first + i, 0, width, 8 * field.offset + width * i) for i in range(field.length)
    ]


def _parts(row, number: Number, address: int, first: int = 0, low: int = 0) -> list[_Part]:
    """Where the bits of numbers go. first: of the numbers before these; low: bits before these."""
    if isinstance(number, Chain):
        found: list[_Part] = []
        for part in number.parts:
            found += _parts(row, part, address, first)
            first += count_of(part, row)
        return found
    if isinstance(number, Join):
        found = []
        for part in number.parts:
            found += _parts(row, part, address, first, low)
            low += part.width
        return found
    field = row.fields[number.field]
    found = []
    for i in range(count_of(number, row)):
        word, place = place_of(number, row, i)
        at = 8 * (field.offset + word * field.nbytes)
        if isinstance(number, Trits):
            found.append(_Part(address, first + i, 0, 8, at, 3 ** (4 - place)))
        else:
            found.append(_Part(address, first + i, low, number.width, at + place))
    return found
