"""One block of one row on its way into a packed group: what the pack steps are written in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from runtime.backends.cpu.tile.formats import LINE
from runtime.backends.cpu.tile.vector import I8, I16, I32, Code, ir


@dataclass(frozen=True)
class Row:
    """One block of one row: reads the source, writes the row's lane of the planes."""

    code: Code
    source: Any
    goal: Any
    row: Any
    number: Any  # of the block in its row

    def f16(self, offset: int, to: int) -> None:
        """Copy a float16 into a plane of them at byte `to` of the packed block."""
        value = self.code.load(self.code.at(self.source, offset), I16)
        self.code.store(value, self.code.at(self.goal, to, self.code.times(self.row, 2)), 1)

    def words(
        self, offset: int, to: int, count: int, change: Callable[[Any], Any] | None = None
    ) -> None:
        """Copy `count` words of 4 bytes into word planes, each changed by `change`."""
        lane = self.code.at(self.goal, to, self.code.times(self.row, 4))
        for w in range(count):
            value = self.source_word(offset + 4 * w)
            value = change(value) if change else value
            self.code.store(value, self.code.at(lane, LINE * w), 1)

    def source_word(self, offset: int) -> Any:
        """The four source bytes at `offset`."""
        value = self.code.b.load(self.code.pointer(self.code.at(self.source, offset), I32))
        value.align = 1
        return value

    def source_byte(self, offset: int) -> Any:
        """The source byte at `offset`."""
        return self.code.load(self.code.at(self.source, offset), I8)

    def byte(self, value: Any, to: int) -> None:
        """Put a byte into a plane of them at byte `to` of the packed block."""
        self.code.store(value, self.code.at(self.goal, to, self.row))

    def fifth_bits(self, offset: int, to: int) -> None:
        """32 bits, element by element, become the plane whose bit w, byte k is element 4w + k."""
        b = self.code.b
        bits = self.code.load(self.code.at(self.source, offset), I32, 2)
        plane = ir.Constant(I32, 0)
        for w in range(8):
            four = b.and_(b.lshr(bits, ir.Constant(I32, 4 * w)), ir.Constant(I32, 15))
            # The product has bit k of the four at 8k, among others that the mask drops.
            spread = b.mul(four, ir.Constant(I32, 0x00204081))
            spread = b.and_(spread, ir.Constant(I32, 0x01010101))
            plane = b.or_(plane, b.shl(spread, ir.Constant(I32, w)))
        self.code.store(plane, self.code.at(self.goal, to, self.code.times(self.row, 4)))
