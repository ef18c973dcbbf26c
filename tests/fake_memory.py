"""The fake driver's device memory: allocations at made-up addresses, with contents if wanted."""

from __future__ import annotations

import ctypes
from collections.abc import Container, Sequence
from typing import NamedTuple

import numpy as np

from runtime.ops.errors import BackendError

_FIRST = 1 << 44  # no address of this process looks like it
_EACH = 1 << 42  # addresses of a device
_GAP = 1 << 20  # between allocations, so that an overrun never lands in the next
_POISONED = 1 << 24  # larger allocations begin as zeros, which cost nothing until touched


class Span(NamedTuple):
    """Bytes from `start` to `end`, written or read."""

    start: int
    end: int
    writes: bool


def overlap(a: list[Span], b: list[Span]) -> bool:
    """Whether two share bytes that one of them writes."""
    return any(s.start < t.end and t.start < s.end and (s.writes or t.writes) for s in a for t in b)


class Memory:
    """One device's. Contents exist with `execute` only, and begin as bytes 0xCD."""

    def __init__(self, total: int, execute: bool, device: int = 0) -> None:
        self.total, self.used = total, 0
        self._execute, self._next = execute, _FIRST + device * _EACH
        self._sizes: dict[int, int] = {}
        self._contents: dict[int, np.ndarray] = {}

    def allocate(self, nbytes: int, alignment: int) -> int:
        """The address of a new allocation."""
        address, self.used = self._next, self.used + nbytes
        self._next += -(-(nbytes + _GAP) // alignment) * alignment
        self._sizes[address] = nbytes
        if self._execute:
            self._contents[address] = np.zeros(nbytes, np.uint8)
            if nbytes <= _POISONED:
                self._contents[address].fill(0xCD)
        return address

    def free(self, address: int) -> tuple[int, int]:
        """The first byte and the end of what was freed. BackendError: nothing begins there."""
        nbytes = self._sizes.pop(address, None)
        if nbytes is None:
            raise BackendError(f"fake driver: freed {address:#x}, where no allocation begins")
        self._contents.pop(address, None)
        self.used -= nbytes
        return address, address + nbytes

    def sizes(self) -> list[int]:
        """Bytes of each allocation."""
        return list(self._sizes.values())

    def check(self, start: int, end: int, what: str) -> int:
        """The allocation that holds these bytes. BackendError: none does."""
        for address, nbytes in self._sizes.items():
            if address <= start and end <= address + nbytes:
                return address
        raise BackendError(
            f"fake driver: {what} touches {start:#x} to {end:#x}, which is not allocated"
        )

    def contents(self, address: int, nbytes: int) -> np.ndarray:
        """The bytes themselves, as a view."""
        base = self.check(address, address + nbytes, "an access")
        return self._contents[base][address - base : address - base + nbytes]

    def write(self, address: int, host: int, nbytes: int) -> None:
        """From the host."""
        if self._execute:
            ctypes.memmove(self.contents(address, nbytes).ctypes.data, host, nbytes)

    def read(self, address: int, host: int, nbytes: int) -> None:
        """To the host, which finds zeros where memory has no contents."""
        if self._execute:
            ctypes.memmove(host, self.contents(address, nbytes).ctypes.data, nbytes)
        else:
            ctypes.memset(host, 0, nbytes)

    def move(self, target: int, source: int, nbytes: int) -> None:
        """From one place to another."""
        if self._execute:
            self.contents(target, nbytes)[:] = self.contents(source, nbytes).copy()

    def fill(self, address: int, value: int, nbytes: int) -> None:
        """Every byte `value`."""
        if self._execute:
            self.contents(address, nbytes).fill(value)


class Reached:
    """The memory of all devices as kernels on one of them see it. peers: (who reaches, whom)."""

    def __init__(
        self, memories: Sequence[Memory], reader: int, peers: Container[tuple[int, int]]
    ) -> None:
        self._memories, self._reader, self._peers = memories, reader, peers

    def check(self, start: int, end: int, what: str) -> int:
        """As `Memory.check`. BackendError also for another device's that is out of reach."""
        return self._of(start, what).check(start, end, what)

    def contents(self, address: int, nbytes: int) -> np.ndarray:
        """As `Memory.contents`."""
        return self._of(address, "an access").contents(address, nbytes)

    def _of(self, address: int, what: str) -> Memory:
        device = (address - _FIRST) // _EACH
        if not 0 <= device < len(self._memories):
            device = self._reader
        if device != self._reader and (self._reader, device) not in self._peers:
            raise BackendError(
                f"fake driver: {what} on GPU {self._reader} touches memory of GPU {device}, which "
                "it does not reach"
            )
        return self._memories[device]
