"""Device memory: one allocation, cut into buffers from its start, given back all together.

Plans know every size beforehand, so an arena only moves forward; `mark` and `release` undo what a
step took last. A buffer of a released or closed arena refuses to be used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from runtime.ops.errors import BackendError, MemoryLimitError

from .driver import ALIGNMENT, Owned

if TYPE_CHECKING:
    from .launcher import Device, Stream


def sized(nbytes: int) -> str:
    """Bytes as people read them."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes >= 1 << shift:
            return f"{nbytes / (1 << shift):.4g} {unit}"
    return f"{nbytes} bytes"


class Buffer:
    """A stretch of an arena. `nbytes` from `address` on."""

    def __init__(self, arena: Arena, start: int, nbytes: int) -> None:
        self._arena, self._start, self.nbytes = arena, start, nbytes
        self._number = arena.takes

    @property
    def address(self) -> int:
        """BackendError when the arena has taken the memory back."""
        if not self.alive:
            raise BackendError(f"{self} was released: take a new buffer")
        return self._arena.address + self._start

    @property
    def alive(self) -> bool:
        """Whether the memory is still this buffer's."""
        return self._arena.holds(self._start, self._number)

    def view(self, start: int, nbytes: int | None = None) -> Buffer:
        """Part of it, `start` bytes in. BackendError: it reaches beyond."""
        nbytes = self.nbytes - start if nbytes is None else nbytes
        if start < 0 or nbytes < 0 or start + nbytes > self.nbytes:
            raise BackendError(f"bytes {start} to {start + nbytes} of {self} are not there")
        part = Buffer(self._arena, self._start + start, nbytes)
        part._number = self._number
        return part

    def write(self, array: np.ndarray, stream: Stream) -> None:
        """Copy a contiguous host array to the beginning, in the stream's order.

        An array in pinned memory must be left alone until the stream has done it.
        """
        self._check(array)
        self._arena.device.driver.copy_to_device(
            self.address, array.ctypes.data, array.nbytes, stream.handle
        )

    def read(self, array: np.ndarray, stream: Stream) -> np.ndarray:
        """Copy the beginning to a contiguous host array and wait for the stream; returns it."""
        self._check(array)
        driver = self._arena.device.driver
        driver.copy_to_host(array.ctypes.data, self.address, array.nbytes, stream.handle)
        driver.synchronize(stream.handle)
        return array

    def fill(self, value: int, stream: Stream) -> None:
        """Every byte `value`, in the stream's order."""
        self._arena.device.driver.fill(self.address, value, self.nbytes, stream.handle)

    def _check(self, array: np.ndarray) -> None:
        if not array.flags.c_contiguous:
            raise BackendError(f"an array to copy to or from {self} must be contiguous")
        if array.nbytes > self.nbytes:
            raise BackendError(f"{sized(array.nbytes)} do not fit in {self}")

    def __repr__(self) -> str:
        return f"buffer of {sized(self.nbytes)} in arena {self._arena.name}"


class Arena(Owned):
    """One allocation of a device and what was taken of it."""

    def __init__(self, device: Device, nbytes: int, name: str = "") -> None:
        """MemoryLimitError: the device has no room."""
        self.device, self.nbytes, self.name = device, nbytes, name or "unnamed"
        self.used, self.takes = 0, 0
        self._released: list[tuple[int, int]] = []  # (used, takes) of each release
        device.activate()
        self.address = device.driver.allocate(nbytes)

    def take(self, nbytes: int, alignment: int = ALIGNMENT) -> Buffer:
        """The next `nbytes`. MemoryLimitError: the arena is full; BackendError: it is closed."""
        if not self._open:
            raise BackendError(f"arena {self.name} is closed")
        start = -(-self.used // alignment) * alignment
        if nbytes < 0 or start + nbytes > self.nbytes:
            raise MemoryLimitError(
                f"arena {self.name} of {sized(self.nbytes)} has {sized(self.nbytes - self.used)} "
                f"left, and {sized(nbytes)} were asked for"
            )
        self.used, self.takes = start + nbytes, self.takes + 1
        return Buffer(self, start, nbytes)

    def upload(self, array: np.ndarray, stream: Stream) -> Buffer:
        """A new buffer with the array's bytes."""
        array = np.ascontiguousarray(array)
        buffer = self.take(array.nbytes)
        buffer.write(array, stream)
        return buffer

    def mark(self) -> int:
        """Where `release` goes back to."""
        return self.used

    def release(self, mark: int = 0) -> None:
        """Give back what was taken since the mark, all without one. The caller has waited."""
        if not 0 <= mark <= self.used:
            raise BackendError(f"arena {self.name} has used {self.used} bytes, not {mark}")
        self.used = mark
        self._released = [r for r in self._released if r[0] < mark] + [(mark, self.takes)]

    def holds(self, start: int, number: int) -> bool:
        """Whether the buffer that began at `start` as take `number` is still there."""
        gone = any(start >= mark and number <= takes for mark, takes in self._released)
        return self._open and not gone

    def _free(self) -> None:
        self.device.activate()
        self.device.driver.free(self.address)
