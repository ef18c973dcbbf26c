"""Arrays of the host to the GPU: through pinned memory, copied and packed while more is fetched.

A piece of some MiB is copied to pinned memory by several threads; the GPU copies it from there and
packs it, while the next piece is copied to another place.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from runtime.backends.cuda.arena import Arena, Buffer
from runtime.backends.cuda.driver import ALIGNMENT, Owned
from runtime.backends.cuda.kernels.repack import ROWS, THREADS
from runtime.backends.cuda.launcher import Device, Stream
from runtime.backends.plan.kernel import Kernel

PIECE = 16 << 20  # bytes
_PLACES = 3  # pieces under way
_SHARE = 1 << 20  # bytes, of a thread at least
REPACK = Kernel.of("repack")


class Uploads(Owned):
    """Pinned memory and threads for a while of uploading; `close` waits for all of it."""

    def __init__(self, device: Device, stream: Stream, threads: int, piece: int) -> None:
        """threads: of the host that copy."""
        self._device, self._stream = device, stream
        self._piece = piece = -(-piece // 4) * 4
        self._room = device.arena(_PLACES * (piece + ALIGNMENT), "pieces of weights")
        self._places = [_Place(device, self._room.take(piece)) for _ in range(_PLACES)]
        self._tables: dict[int, Buffer] = {}
        self._arenas: list[Arena] = [self._room]
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self._next, self._threads = 0, threads
        device.activate()

    def copy(self, source: np.ndarray, out: Buffer) -> Iterator[int]:
        """uint8 [bytes] as it is; yields the bytes done after each piece."""
        for start in range(0, source.nbytes, self._piece):
            part = source[start : start + self._piece]
            place = self._filled(part)
            out.view(start).write(place.pinned.array[: part.nbytes], self._stream)
            place.free.record(self._stream)
            yield part.nbytes

    def repack(self, source: np.ndarray, out: Buffer, table: np.ndarray) -> Iterator[int]:
        """Rows uint8 [rows, bytes] through a table of `wiring`; yields the bytes done."""
        (rows, nbytes), words = source.shape, len(table)
        step = max(1, self._piece // nbytes)
        wires = self._table(table)
        for first in range(0, rows, step):
            part = source[first : first + step]
            place = self._filled(part.reshape(-1))
            place.device.write(place.pinned.array[: part.nbytes], self._stream)
            target = out.view(4 * words * first, 4 * words * len(part))
            grid = -(-words // THREADS), -(-len(part) // ROWS)
            values = place.device, wires, target, words, len(part), 8 * nbytes
            self._device.launch(REPACK, grid, *values).run(self._stream)
            place.free.record(self._stream)
            yield part.nbytes

    def _table(self, table: np.ndarray) -> Buffer:
        """The table on the device, where it stays: there are few."""
        if id(table) not in self._tables:
            arena = self._device.arena(table.nbytes, "wiring")
            self._tables[id(table)] = arena.upload(table, self._stream)
            self._arenas.append(arena)
        return self._tables[id(table)]

    def _filled(self, part: np.ndarray) -> _Place:
        """A place with these bytes, once the GPU has done with what was there."""
        place = self._places[self._next]
        self._next = (self._next + 1) % _PLACES
        if place.used:
            place.free.synchronize()
        place.used = True
        target = place.pinned.array[: part.nbytes]
        cuts = range(0, part.nbytes, max(_SHARE, -(-part.nbytes // self._threads)))
        if self._pool is None or len(cuts) == 1:
            target[:] = part
            return place
        share = cuts.step
        for done in [
            self._pool.submit(np.copyto, target[at : at + share], part[at : at + share])
            for at in cuts
        ]:
            done.result()
        return place

    def _free(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
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
