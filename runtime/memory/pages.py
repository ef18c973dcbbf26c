"""Pages of the KV cache: who holds which, shared by count, copied on write.

A page holds PAGE tokens of every layer. A sequence lists its pages in order; a fork lists the
same ones. A page that several sequences hold is never written: the writer takes a copy first.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence

import numpy as np

from runtime.backends import forks
from runtime.errors import MemoryLimitError
from runtime.ops import PAGE


class PagePool:
    """`count` physical pages; `arrays` are the layers' memory, first axis = page."""

    def __init__(self, count: int, arrays: Sequence[np.ndarray]) -> None:
        self.count = count
        self._lock = forks.lock()  # sessions of several threads share the pool
        self._arrays = arrays
        self._holders = np.zeros(count, np.int32)
        self._free = list(range(count - 1, -1, -1))
        self._abandoned: deque[np.ndarray] = deque()

    @property
    def free(self) -> int:
        """Pages that no sequence holds."""
        self._collect()
        return len(self._free)

    def need(self, n: int) -> None:
        """MemoryLimitError unless n pages are free."""
        if len(self._free) < n and self.free < n:
            raise MemoryLimitError(
                f"all {self.count} pages of the KV cache ({self.count * PAGE} tokens) are in use; "
                "close sessions or snapshots, or load the model with a larger `sequences` or a "
                "smaller `context`"
            )

    def allocate(self) -> int:
        """A page with one holder; MemoryLimitError when all are held."""
        with self._lock:
            self.need(1)
            page = self._free.pop()
            self._holders[page] = 1
            return page

    def share(self, pages: np.ndarray) -> None:
        """One more holder for each of these different pages."""
        with self._lock:
            self._holders[pages] += 1

    def release(self, pages: np.ndarray) -> None:
        """One holder less for each of these different pages; those without holders are free."""
        with self._lock:
            self._holders[pages] -= 1
            self._free.extend(pages[self._holders[pages] == 0].tolist())

    def abandon(self, pages: np.ndarray) -> None:
        """`release` at the next opportunity: safe where a garbage collection may call."""
        self._abandoned.append(pages)

    def is_shared(self, page: int) -> bool:
        """Whether more than one sequence holds it."""
        return bool(self._holders[page] > 1)

    def copies(self, writers: Counter[int]) -> int:
        """How many copies it takes that each page has `writers[page]` writers on their own."""
        return sum(min(n, int(self._holders[page]) - 1) for page, n in writers.items())

    def copy_too(self, arrays: Sequence[np.ndarray]) -> None:
        """From now on a copied page is copied in these arrays too; first axis = page."""
        self._arrays = [*self._arrays, *arrays]

    def own(self, page: int) -> int:
        """A page with the same content that only the caller holds: itself, or a copy.

        MemoryLimitError leaves everything as it was.
        """
        if not self.is_shared(page):
            return page
        with self._lock:
            copy = self.allocate()
            for array in self._arrays:
                array[copy] = array[page]
            self._holders[page] -= 1
            return copy

    def _collect(self) -> None:
        with self._lock:
            while self._abandoned:
                self.release(self._abandoned.popleft())


class BlockTable:
    """The pages of one sequence of at most `capacity` tokens, as kernels read them."""

    def __init__(self, pool: PagePool, capacity: int) -> None:
        self.pool = pool
        self._row = np.zeros(-(-capacity // PAGE), np.int32)
        self._used = 0

    @property
    def row(self) -> np.ndarray:
        """int32 physical pages in the order of the sequence."""
        return self._row[: self._used]

    def reserve(self, start: int, stop: int) -> None:
        """Make places start..stop-1 writable: new pages, and copies of shared ones.

        MemoryLimitError leaves everything as it was.
        """
        reserve([(self, start, stop)])

    def writable(self, start: int, stop: int) -> bool:
        """Whether places start..stop-1 have pages that nobody else holds."""
        return -(-stop // PAGE) <= self._used and not any(
            self.pool.is_shared(page) for page in self._row[start // PAGE : -(-stop // PAGE)]
        )

    def wanted(self, start: int, stop: int) -> tuple[np.ndarray, int]:
        """Pages of places start..stop-1 that are there, and how many are still to come."""
        end = -(-stop // PAGE)
        return self._row[start // PAGE : min(end, self._used)], max(0, end - self._used)

    def take(self, start: int, stop: int) -> None:
        """As `reserve`, where it is known that there are pages enough."""
        for index in range(start // PAGE, min(self._used, -(-stop // PAGE))):
            self._row[index] = self.pool.own(int(self._row[index]))
        for index in range(self._used, -(-stop // PAGE)):
            self._row[index] = self.pool.allocate()
            self._used = index + 1

    def slots(self, start: int, stop: int) -> np.ndarray:
        """int32 slot (page * PAGE + offset) of places start..stop-1."""
        places = np.arange(start, stop, dtype=np.int32)
        return self._row[places // PAGE] * PAGE + places % PAGE

    def slot(self, place: int) -> int:
        """The slot of one place."""
        return int(self._row[place // PAGE]) * PAGE + place % PAGE

    def truncate(self, length: int) -> None:
        """Give back pages past `length` tokens."""
        keep = -(-length // PAGE)
        if keep < self._used:
            self.pool.release(self._row[keep : self._used].copy())
            self._used = keep

    def abandon(self) -> None:
        """Give back all pages, whenever the pool is next asked."""
        self.pool.abandon(self.row.copy())
        self._used = 0

    def fork(self) -> BlockTable:
        """The same pages, held once more."""
        other = BlockTable(self.pool, 0)
        other._row, other._used = self._row.copy(), self._used
        self.pool.share(self.row)
        return other


def reserve(requests: Iterable[tuple[BlockTable, int, int]]) -> None:
    """Make places start..stop-1 of several tables (of one pool) writable, or change nothing.

    MemoryLimitError when there are not pages enough for all of them.
    """
    requests = [r for r in requests if not r[0].writable(r[1], r[2])]
    if not requests:
        return
    pool = requests[0][0].pool
    new, writers = 0, Counter[int]()
    for table, start, stop in requests:
        held, missing = table.wanted(start, stop)
        writers.update(held.tolist())
        new += missing
    pool.need(new + pool.copies(writers))
    for table, start, stop in requests:
        table.take(start, stop)
