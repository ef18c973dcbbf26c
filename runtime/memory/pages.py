"""Pages of the KV cache: who holds which, shared by count, copied on write.

A page holds PAGE tokens of every layer. A sequence lists its pages in order; a fork lists the
same ones. A page that several sequences hold is never written: the writer takes a copy first.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from runtime.errors import MemoryLimitError
from runtime.ops import PAGE


class PagePool:
    """`count` physical pages; `arrays` are the layers' memory, first axis = page."""

    def __init__(self, count: int, arrays: Sequence[np.ndarray]) -> None:
        self.count = count
        self._lock = threading.RLock()  # sessions of several threads share the pool
        self._arrays = arrays
        self._holders = np.zeros(count, np.int32)
        self._free = list(range(count - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def allocate(self) -> int:
        """A page with one holder; MemoryLimitError when all are held."""
        with self._lock:
            if not self._free:
                raise MemoryLimitError(
                    f"all {self.count} pages of the KV cache ({self.count * PAGE} tokens) are in "
                    "use; close sessions, or load the model with a larger `sequences` or a smaller "
                    "`context`"
                )
            page = self._free.pop()
            self._holders[page] = 1
            return page

    def share(self, pages: Sequence[int]) -> None:
        """One more holder for each."""
        with self._lock:
            for page in pages:
                self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less for each; a page without holders is free again."""
        with self._lock:
            for page in pages:
                self._holders[page] -= 1
                if self._holders[page] == 0:
                    self._free.append(page)

    def is_shared(self, page: int) -> bool:
        """Whether more than one sequence holds it."""
        return bool(self._holders[page] > 1)

    def own(self, page: int) -> int:
        """A page with the same content that only the caller holds: itself, or a copy."""
        if not self.is_shared(page):
            return page
        copy = self.allocate()
        for array in self._arrays:
            array[copy] = array[page]
        self.release([page])
        return copy


class BlockTable:
    """The pages of one sequence of at most `capacity` tokens, as kernels read them."""

    def __init__(self, pool: PagePool, capacity: int) -> None:
        self._pool = pool
        self._row = np.zeros(-(-capacity // PAGE), np.int32)
        self._used = 0

    @property
    def row(self) -> np.ndarray:
        """int32 physical pages in the order of the sequence."""
        return self._row[: self._used]

    def reserve(self, start: int, stop: int) -> None:
        """Make places start..stop-1 writable: new pages, and copies of shared ones.

        MemoryLimitError leaves the table as it was, apart from copies already made.
        """
        for index in range(start // PAGE, -(-stop // PAGE)):
            if index < self._used:
                self._row[index] = self._pool.own(int(self._row[index]))
            else:
                self._row[index] = self._pool.allocate()
                self._used = index + 1

    def slots(self, start: int, stop: int) -> np.ndarray:
        """int32 slot (page * PAGE + offset) of places start..stop-1."""
        places = np.arange(start, stop)
        return self._row[places // PAGE] * PAGE + (places % PAGE).astype(np.int32)

    def truncate(self, length: int) -> None:
        """Give back pages past `length` tokens."""
        keep = -(-length // PAGE)
        if keep < self._used:
            self._pool.release([int(p) for p in self._row[keep : self._used]])
            self._used = keep

    def fork(self) -> BlockTable:
        """The same pages, held once more."""
        other = BlockTable(self._pool, 0)
        other._row, other._used = self._row.copy(), self._used
        self._pool.share([int(p) for p in self.row])
        return other
