"""Rows of the host to the GPU: read into pinned memory, copied and packed while more is read.

A piece of some MiB is read from its file straight into pinned memory; the GPU copies it from there
and packs it, while the next piece is read into another place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from runtime.backends.cuda.arena import Arena, Buffer
from runtime.backends.cuda.driver import ALIGNMENT, Owned
from runtime.backends.cuda.kernels.repack import ROWS, THREADS
from runtime.backends.cuda.launcher import Device, Stream
from runtime.backends.plan.kernel import Kernel

PIECE = 16 << 20  # bytes
_PLACES = 3  # pieces under way
REPACK = Kernel.of("repack")
Read = Callable[[int, int, np.ndarray], np.ndarray]  # as `StoredRows.read`


class Uploads(Owned):
    """Pinned memory for a while of uploading; `close` waits for all of it.

    piece: bytes that are under way at once, which a row must not have more of.
    """

    def __init__(self, device: Device, stream: Stream, piece: int) -> None:
        device.activate()
        self._device, self._stream = device, stream
        self._piece = piece = -(-piece // 4) * 4
        self._room = device.arena(_PLACES * (piece + ALIGNMENT), "pieces of weights")
        self._places = [_Place(device, self._room.take(piece)) for _ in range(_PLACES)]
        self._tables: dict[int, Buffer] = {}
        self._arenas: list[Arena] = [self._room]
        self._next = 0

    def rows(
        self, read: Read, shape: tuple[int, int], out: Buffer, table: np.ndarray | None = None
    ) -> Iterator[int]:
        """Rows of `shape` (rows, bytes), as they are or through a table of `wiring`.

        read: gives the rows from one on, in the room it is given or elsewhere. Yields the bytes of
        each piece once the GPU was given it.
        """
        rows, nbytes = shape
        assert nbytes <= self._piece, "a row fits into a piece"
        step = max(1, self._piece // max(1, nbytes))
        for first in range(0, rows, step):
            count = min(step, rows - first)
            pinned, place = self._filled(read, first, count, nbytes)
            if table is None:
                out.view(nbytes * first, pinned.nbytes).write(pinned, self._stream)
            else:
                place.device.write(pinned, self._stream)
                target = out.view(4 * len(table) * first, 4 * len(table) * count)
                self._repack(place.device, table, target, count, nbytes)
            place.free.record(self._stream)
            yield pinned.nbytes

    def _repack(self, raw: Buffer, table: np.ndarray, out: Buffer, rows: int, nbytes: int) -> None:
        grid = -(-len(table) // THREADS), -(-rows // ROWS)
        values = raw, self._table(table), out, len(table), rows, 8 * nbytes
        self._device.launch(REPACK, grid, *values).run(self._stream)

    def _table(self, table: np.ndarray) -> Buffer:
        """The table on the device, where it stays: there are few."""
        if id(table) not in self._tables:
            arena = self._device.arena(table.nbytes, "wiring")
            self._tables[id(table)] = arena.upload(table, self._stream)
            self._arenas.append(arena)
        return self._tables[id(table)]

    def _filled(self, read: Read, first: int, count: int, nbytes: int) -> tuple[np.ndarray, _Place]:
        """Rows in pinned memory, once the GPU has done with what was there."""
        place = self._places[self._next]
        self._next = (self._next + 1) % _PLACES
        if place.used:
            place.free.synchronize()
        place.used = True
        room = place.pinned.array[: count * nbytes]
        found = read(first, count, room)
        if found.ctypes.data != room.ctypes.data or not found.flags.c_contiguous:
            room.reshape(count, nbytes)[:] = found
        return room, place

    def _free(self) -> None:
        self._stream.synchronize()
        for place in self._places:
            place.pinned.close()
            place.free.close()
        for arena in self._arenas:
            arena.close()


class _Place:
    """Pinned memory, as much on the device, and the event after which both are free again."""

    def __init__(self, device: Device, room: Buffer) -> None:
        self.device, self.used = room, False
        self.pinned, self.free = device.pinned((room.nbytes,), np.uint8), device.event()
