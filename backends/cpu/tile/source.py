"""Blocks of the file as LLVM values: what `ops/blocks.py` says of a format, read from memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtime.backends.cpu.tile.vector import F32, I8, I16, I32, Code, ir, undefined, vec
from runtime.ops.blocks import (
    Bits,
    BlockFormat,
    Chain,
    Join,
    Number,
    Scale,
    Trits,
    count_of,
    place_of,
)


@dataclass(frozen=True)
class Source:
    """One block of one row, at an int64 address. Numbers are vectors of int32."""

    code: Code
    row: BlockFormat
    address: Any

    def numbers(self, number: Number, first: int, count: int) -> Any:
        """Numbers first .. first + count - 1 of a kind; of a Chain all from one part."""
        match number:
            case Bits():
                return self._bits(number, range(first, first + count))
            case Trits():
                return self._trits(number, range(first, first + count))
            case Join():
                return self._joined(number, first, count)
            case Chain():
                part, size = number.parts[0], count_of(number.parts[0], self.row)
                if first < size:
                    return self.numbers(part, first, count)
                return self.numbers(Chain(number.parts[1:]), first - size, count)

    def _bits(self, number: Bits, which: range) -> Any:
        b, code, field = self.code.b, self.code, self.row.fields[number.field]
        words, shifts = zip(*(place_of(number, self.row, i) for i in which), strict=True)
        found = self._words(number.field, words, signed=field.kind[0] == "i")
        if any(shifts):
            found = b.lshr(found, ir.Constant(found.type, shifts))
        if number.width == 8 * field.nbytes:
            return found
        return b.and_(found, code.fill(I32, (1 << number.width) - 1, len(which)))

    def _trits(self, number: Trits, which: range) -> Any:
        """A byte is a fraction of 256: digit j is the whole part of 3 * frac(3**j * fraction)."""
        b, code = self.code.b, self.code
        words, digits = zip(*(place_of(number, self.row, i) for i in which), strict=True)
        found = self._words(number.field, words)
        powers = ir.Constant(found.type, [3**digit for digit in digits])
        rest = b.and_(b.mul(found, powers), code.fill(I32, 255, len(which)))
        return b.lshr(b.mul(rest, code.fill(I32, 3, len(which))), code.fill(I32, 8, len(which)))

    def _joined(self, number: Join, first: int, count: int) -> Any:
        found, place = self.numbers(number.parts[0], first, count), 0
        for before, part in zip(number.parts, number.parts[1:], strict=False):
            place += before.width
            shift = self.code.fill(I32, place, count)
            found = self.code.b.or_(found, self.code.b.shl(self.numbers(part, first, count), shift))
        return found

    def _words(self, field: str, which: Sequence[int], signed: bool = False) -> Any:
        """These words of a field as int32, one in each lane; only what lies between is read."""
        code, start, end = self.code, min(which), max(which) + 1
        found = self.load(field, start, end - start)
        picks = [word - start for word in which]
        if picks != list(range(end - start)):
            found = code.shuffle(found, undefined(found.type), picks)
        if found.type.element == I32:
            return found
        return (code.b.sext if signed else code.b.zext)(found, vec(I32, len(picks)))

    def load(self, field: str, first: int, count: int) -> Any:
        """Values of a field as integers of their size."""
        found = self.row.fields[field]
        place = self.code.at(self.address, found.offset + first * found.nbytes)
        return self.code.load(place, vec(ir.IntType(8 * found.nbytes), count))

    def sign_bytes(self, first: int, count: int) -> Any:
        """The sign bits of every eight elements: as stored, or seven and what makes them even."""
        code, b = self.code, self.code.b
        assert self.row.signs is not None, "a format with signs"
        signs = self.numbers(self.row.signs, first, count)
        if self.row.signs.width == 8:
            return signs
        ones = code.intrinsic(f"llvm.ctpop.v{count}i32", signs.type, [signs])
        odd = b.and_(ones, code.fill(I32, 1, count))
        return b.or_(signs, b.shl(odd, code.fill(I32, 7, count)))

    def scale(self, scale: Scale, group: int) -> Any:
        """The scale (or minimum) of a group, a vector of one float32."""
        b, code, found = self.code.b, self.code, self._base(scale, group)
        if scale.steps:
            steps = self.numbers(scale.steps, group if self._groups(scale) > 1 else 0, 1)
            steps = b.mul(steps, code.fill(I32, scale.times, 1))
            steps = b.add(steps, code.fill(I32, scale.plus, 1))
            found = b.fmul(found, b.sitofp(steps, found.type))
        return found if scale.unit == 1 else b.fmul(found, code.fill(F32, scale.unit, 1))

    def _groups(self, scale: Scale) -> int:
        return count_of(scale.steps, self.row) if scale.steps else 1

    def _base(self, scale: Scale, group: int) -> Any:
        if isinstance(scale.base, Bits):
            return self.code.half_to_float(self.pieces(scale.base))
        field = self.row.fields[scale.base]
        value = self.load(scale.base, group if field.length > 1 else 0, 1)
        match field.kind:
            case "f2":
                return self.code.half_to_float(value)
            case "f4":
                return self.code.b.bitcast(value, vec(F32, 1))
            case "half_e8m0":
                return half_power(self.code, self.code.b.zext(value, vec(I32, 1)))
            case _:
                clean = usable_e4m3(self.code, value)
                return half_e4m3(self.code, self.code.b.zext(clean, vec(I32, 1)))

    def pieces(self, number: Bits) -> Any:
        """16 bits in pieces, joined, as a vector of one int16."""
        b, whole = self.code.b, self.code.fill(I32, 0, 1)
        for i in range(count_of(number, self.row)):
            piece = self.numbers(number, i, 1)
            whole = b.or_(whole, b.shl(piece, self.code.fill(I32, number.width * i, 1)))
        return b.trunc(whole, vec(I16, 1))


def half_power(code: Code, e: Any) -> Any:
    """2^(e - 128) for e in 0..255: E8M0 powers of two, halved as the values are doubled.

    As bits (e - 1) << 23, or the denormals (e + 1) << 21, which are smaller except for e < 2.
    """
    b, n = code.b, e.type.count
    usual = b.shl(b.sub(e, code.fill(I32, 1, n)), code.fill(I32, 23, n))
    tiny = b.shl(b.add(e, code.fill(I32, 1, n)), code.fill(I32, 21, n))
    larger = b.select(b.icmp_signed(">", usual, tiny), usual, tiny)
    return b.bitcast(larger, vec(F32, n))


def half_e4m3(code: Code, bits: Any) -> Any:
    """Half the float of four exponent bits (bias 7) and three of mantissa, denormals included."""
    n = bits.type.count
    value = code.b.bitcast(code.b.shl(bits, code.fill(I32, 20, n)), vec(F32, n))
    return code.b.fmul(value, code.fill(F32, 2.0**119, n))


def usable_e4m3(code: Code, bits: Any) -> Any:
    """Bytes without their unused top bit; 0x7f is no number and stands for zero."""
    b = code.b
    usable = b.icmp_unsigned("!=", bits, code.fill(I8, 0x7F, bits.type.count))
    bits = b.and_(bits, code.fill(I8, 0x7F, bits.type.count))
    return b.select(usable, bits, code.fill(I8, 0, bits.type.count))
