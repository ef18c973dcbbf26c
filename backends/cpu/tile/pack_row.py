"""One block of one row on its way into a packed group: the planes of `formats`, value by value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runtime.backends.cpu.tile.formats import ROWS, Copy, Format, Half, Numbers, Plane, Spread
from runtime.backends.cpu.tile.source import Source, usable_e4m3
from runtime.backends.cpu.tile.vector import I32, ir, vec
from runtime.ops.blocks import Number, Scale


@dataclass(frozen=True)
class Row:
    """One block of one row: reads the source, writes the row's lane of the planes."""

    source: Source
    goal: Any  # address of the packed block
    row: Any  # number of the row in its group, int64

    def pack(self, layout: Format) -> None:
        """All planes of the block."""
        self._planes(layout.head, 0, 0)
        for chunk in range(layout.chunks):
            self._planes(layout.each, chunk, layout.header + chunk * layout.chunk_bytes)

    def _planes(self, planes: tuple[Plane, ...], chunk: int, to: int) -> None:
        code = self.source.code
        for plane in planes:
            lane = code.at(self.goal, to, code.times(self.row, plane.unit))
            for i in range(plane.planes):
                value = self._value(plane, chunk * plane.planes + i)
                code.store(value, code.at(lane, ROWS * plane.unit * i))
            to += ROWS * plane.unit * plane.planes

    def _value(self, plane: Plane, i: int) -> Any:
        """Value i of a plane, in all chunks together."""
        match plane:
            case Copy():
                return self._copied(plane, i)
            case Half():
                return self._half(plane)
            case Numbers():
                return self._numbers(plane, i)
            case Spread():
                return _SPREAD[plane.width](self, self._bits(plane.field, 4 * i, 4))
        raise AssertionError(f"no plane of plain numbers: {plane}")

    def _bits(self, field: str, first: int, nbytes: int) -> Any:
        """Bytes of a field as one integer."""
        code = self.source.code
        place = code.at(self.source.address, self.source.row.fields[field].offset + first)
        value = code.b.load(code.pointer(place, ir.IntType(8 * nbytes)))
        value.align = 1
        return value

    def _copied(self, plane: Copy, i: int) -> Any:
        code, b = self.source.code, self.source.code.b
        match plane.change:
            case "unsigned":  # signed bytes and 128
                return b.xor(self._bits(plane.field, 4 * i, 4), ir.Constant(I32, 0x80808080))
            case "usable":
                return usable_e4m3(code, self.source.load(plane.field, i, 1))
            case "thirds":
                return self._third_bits(plane.field, i)
            case _:
                return self._bits(plane.field, plane.unit * i, plane.unit)

    def _half(self, plane: Half) -> Any:
        scale = self._scale(plane.of)
        if isinstance(scale.base, str):
            return self._bits(scale.base, 0, 2)
        return self.source.pieces(scale.base)

    def _scale(self, name: str) -> Scale:
        row = self.source.row
        found = row.minimum if name == "minimum" else row.scale
        assert found is not None, "a format with minima"
        return found

    def _numbers(self, plane: Numbers, i: int) -> Any:
        """As many numbers as fit side by side, one by one: SSE2 has no shifts by lane."""
        code, b, count = self.source.code, self.source.code.b, 8 * plane.unit // plane.width
        joined = code.fill(I32, 0, 1)
        for k in range(count):
            found = self._those(plane.of, count * i + k, 1)
            if plane.low:
                found = b.lshr(found, code.fill(I32, plane.low, 1))
            if count > 1:
                found = b.and_(found, code.fill(I32, (1 << plane.width) - 1, 1))
            joined = b.or_(joined, b.shl(found, code.fill(I32, plane.width * k, 1)))
        return joined if plane.unit == 4 else b.trunc(joined, vec(ir.IntType(8 * plane.unit), 1))

    def _those(self, name: str, first: int, count: int) -> Any:
        source = self.source
        match name:
            case "codes":
                return source.numbers(source.row.codes, first, count)
            case "signs":
                return source.sign_bytes(first, count)
            case "turned":
                return self._turned(self._steps("scale", first, count))
            case _:
                return self._steps(name, first, count)

    def _steps(self, name: str, first: int, count: int) -> Any:
        """Whole multiples of the float16, those of code books as they are stored."""
        scale = self._scale(name)
        steps: Number | None = scale.steps
        assert steps is not None, "a scale with steps"
        found = self.source.numbers(steps, first, count)
        if scale.times != 1 or not scale.plus:
            return found
        return self.source.code.b.add(found, self.source.code.fill(I32, scale.plus, count))

    def _turned(self, steps: Any) -> Any:
        """Bytes of t = -steps: |t|, and the top bit where t is negative."""
        b, code, count = self.source.code.b, self.source.code, steps.type.count
        t = b.neg(steps)
        size = b.select(b.icmp_signed("<", t, steps), steps, t)
        return b.or_(size, b.and_(t, code.fill(I32, 128, count)))

    def _third_bits(self, field: str, i: int) -> Any:
        """Eight source words of bits, four of them for each half: two words become one."""
        b, (half, w) = self.source.code.b, divmod(i, 4)
        mask = ir.Constant(I32, 0x0F0F0F0F)
        low, high = (
            b.and_(b.lshr(self._bits(field, 4 * (w + k), 4), ir.Constant(I32, 4 * half)), mask)
            for k in (0, 4)
        )
        return b.or_(low, b.shl(high, ir.Constant(I32, 4)))


def _single_bits(row: Row, bits: Any) -> Any:
    """Bit 4 w + k goes to bit w of byte k."""
    b, plane = row.source.code.b, ir.Constant(I32, 0)
    for w in range(8):
        four = b.and_(b.lshr(bits, ir.Constant(I32, 4 * w)), ir.Constant(I32, 15))
        # The product has bit k of the four at 8k, among others that the mask drops.
        spread = b.mul(four, ir.Constant(I32, 0x00204081))
        spread = b.and_(spread, ir.Constant(I32, 0x01010101))
        plane = b.or_(plane, b.shl(spread, ir.Constant(I32, w)))
    return plane


def _pairs_of_bits(row: Row, bits: Any) -> Any:
    """A 4 x 4 matrix of two bits is transposed: four neighbours in a byte go to four bytes."""
    b = row.source.code.b

    def swapped(value: Any, distance: int, mask: int) -> Any:
        """The bits of a mask and those `distance` above change places."""
        change = b.xor(value, b.lshr(value, ir.Constant(I32, distance)))
        change = b.and_(change, ir.Constant(I32, mask))
        return b.xor(value, b.or_(change, b.shl(change, ir.Constant(I32, distance))))

    return swapped(swapped(bits, 12, 0x0000F0F0), 6, 0x00CC00CC)


_SPREAD = {1: _single_bits, 2: _pairs_of_bits}
