"""Pages and slots of a model in the plain layout, which every arrangement of devices can read.

A page is uint8: of each layer K and then V, as `KVFormat.to_rows` has them, [PAGE, heads, bytes of
a token]. A slot is uint8: of each layer float32 of its convolution and of its state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from runtime.backends.base import Backend
from runtime.models.step import Step
from runtime.ops import PAGE
from runtime.ops.kv_formats import HEAD_UNIT, fill, kv_format
from runtime.ops.tensor import Tensor

TOGETHER = 32  # pages that are read from disk, or written to the device, in one go
_AHEAD = 2  # such lots that are read before they are needed
Fill = Callable[[int, np.ndarray], bool]  # the n-th page into uint8 [nbytes]; whether it is there


class PlainState:
    """Reads and writes whole pages and slots; whoever calls holds the engine's lock."""

    def __init__(self, backend: Backend, step: Step) -> None:
        """step: of any size, with the memory of the model."""
        self._backend = backend
        self._pages = [leaf for n in step.k for leaf in (step.k[n], step.v[n])]
        memory = (step.conv, step.delta)
        self._slots = [of[layer] for layer in step.conv for of in memory if layer in of]
        self.page_nbytes = sum(map(_page_nbytes, self._pages))
        self.slot_nbytes = sum(map(_slot_nbytes, self._slots))

    def pages(self, rows: Sequence[int]) -> np.ndarray:
        """uint8 [rows, page_nbytes]."""
        out, at = np.empty((len(rows), self.page_nbytes), np.uint8), 0
        for leaf in self._pages:
            form, values = kv_format(leaf.dtype.name), self._backend.read_state(leaf, rows)
            if values.dtype != np.uint8:
                values = form.to_rows(form.encode(fill(values, HEAD_UNIT)))
            start, at = at, at + _page_nbytes(leaf)
            out[:, start:at] = values.reshape(len(rows), -1)
        return out

    def write_pages(self, rows: Sequence[int], values: np.ndarray) -> None:
        """values: uint8 [rows, page_nbytes]."""
        at = 0
        for leaf in self._pages:
            start, at = at, at + _page_nbytes(leaf)
            shape = (len(rows), PAGE, int(leaf.shape[2]), -1)
            self._backend.write_state(leaf, rows, values[:, start:at].reshape(shape))

    def slot(self, row: int) -> np.ndarray:
        """uint8 [slot_nbytes]."""
        parts = (self._backend.read_state(leaf, [row]) for leaf in self._slots)
        return np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])

    def write_slot(self, row: int, values: np.ndarray) -> None:
        """values: uint8 [slot_nbytes]."""
        at = 0
        for leaf in self._slots:
            start, at = at, at + _slot_nbytes(leaf)
            part = np.ascontiguousarray(values[start:at]).view(np.float32)
            self._backend.write_state(leaf, [row], part.reshape(1, *map(int, leaf.shape[1:])))

    def without(self, page: np.ndarray, tokens: int) -> np.ndarray:
        """A page, uint8 [page_nbytes], of which only the first so many tokens are anything."""
        out, at = page.copy(), 0
        for leaf in self._pages:
            start, at = at, at + _page_nbytes(leaf)
            out[start:at].reshape(PAGE, -1)[tokens:] = 0
        return out

    def write_from(self, rows: Sequence[int], read: Fill) -> int:
        """Fill pages with what `read` gives of each in turn, in a thread of its own meanwhile.

        How many there were up to the first that is not there; the others may hold anything.
        """
        done = 0
        for first, (there, values) in self._read_ahead(len(rows), read):
            if there:
                self.write_pages(rows[first : first + there], values[:there])
            done += there
            if there < len(values):
                break
        return done

    def _read_ahead(self, count: int, read: Fill) -> Iterator[tuple[int, tuple[int, np.ndarray]]]:
        """(first, (pages that are there, uint8 [pages, page_nbytes])), valid until the next."""
        rooms = [np.empty((TOGETHER, self.page_nbytes), np.uint8) for _ in range(_AHEAD + 1)]
        lots = [*range(0, count, TOGETHER)]

        def lot(number: int) -> tuple[int, np.ndarray]:
            first = lots[number]
            room = rooms[number % len(rooms)][: min(TOGETHER, count - first)]
            there = next((n for n, page in enumerate(room) if not read(first + n, page)), len(room))
            return there, room

        waiting: list[Future[tuple[int, np.ndarray]]] = []
        with ThreadPoolExecutor(1) as pool:
            try:
                for number in range(min(_AHEAD, len(lots))):
                    waiting.append(pool.submit(lot, number))
                for number, first in enumerate(lots):
                    found = waiting.pop(0).result()
                    yield first, found
                    if number + _AHEAD < len(lots):
                        waiting.append(pool.submit(lot, number + _AHEAD))
            finally:
                for each in waiting:
                    each.cancel()


def _page_nbytes(leaf: Tensor) -> int:
    _, page, heads, dim = map(int, leaf.shape)
    return page * heads * kv_format(leaf.dtype.name).token_nbytes(dim)


def _slot_nbytes(leaf: Tensor) -> int:
    return 4 * leaf.size // int(leaf.shape[0])
