"""Pinned host memory, which copies use while the host goes on: what it must leave alone till then.

What is copied to the device may not be changed, and what is copied from it is not there, before
the host has waited for the copy.
"""

from __future__ import annotations

import ctypes
import zlib
from typing import Any, NamedTuple

from fake_order import Order

from runtime.ops.errors import BackendError

_POISON = 0xCD


class _Copy(NamedTuple):
    stream: Any
    time: int
    host: int
    nbytes: int
    sum: int  # of what is copied to the device
    found: bytes | None  # what is copied from it


class PinnedMemory:
    """Its blocks, and the copies that the host has yet to wait for."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._blocks: dict[int, Any] = {}
        self._copies: list[_Copy] = []

    def allocate(self, nbytes: int) -> int:
        """The address of a new block."""
        block = ctypes.create_string_buffer(nbytes)
        self._blocks[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def free(self, address: int) -> None:
        """BackendError: nothing begins there, or a copy of it was not waited for."""
        block = self._blocks.pop(address, None)
        if block is None:
            raise BackendError(f"fake driver: freed pinned memory {address:#x}, which is none")
        end = address + len(block)
        if any(address <= copy.host < end for copy in self._copies):
            raise BackendError("fake driver: freed pinned memory before its copy was waited for")

    def holds(self, host: int) -> bool:
        """Whether an address is in pinned memory."""
        return any(a <= host < a + len(block) for a, block in self._blocks.items())

    def sent(self, stream: Any, host: int, nbytes: int) -> None:
        """A copy to the device, given to a stream."""
        total = zlib.adler32(ctypes.string_at(host, nbytes))
        self._add(_Copy(stream, self._order.now(stream), host, nbytes, total, None))

    def fetched(self, stream: Any, host: int, found: bytes) -> None:
        """A copy from the device: the host finds poison until it has waited."""
        ctypes.memset(host, _POISON, len(found))
        self._add(_Copy(stream, self._order.now(stream), host, len(found), 0, found))

    def settle(self) -> None:
        """The host waited for something. BackendError: it changed what was to be copied."""
        done = [c for c in self._copies if self._order.waited(c.stream, c.time)]
        self._copies = [c for c in self._copies if c not in done]
        for copy in done:
            if copy.found is not None:
                ctypes.memmove(copy.host, copy.found, copy.nbytes)
            elif zlib.adler32(ctypes.string_at(copy.host, copy.nbytes)) != copy.sum:
                raise BackendError(
                    "fake driver: pinned memory was changed before its copy to the device was "
                    "waited for"
                )

    def _add(self, copy: _Copy) -> None:
        end = copy.host + copy.nbytes
        for old in self._copies:
            if old.host < end and copy.host < old.host + old.nbytes and (old.found or copy.found):
                raise BackendError("fake driver: pinned memory of a copy that was not waited for")
        self._copies.append(copy)
