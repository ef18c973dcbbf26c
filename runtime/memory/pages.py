"""Pages of the KV cache: who holds which is read off the sequences, never counted.

A page holds PAGE tokens of every layer. A sequence lists its pages in order; a fork lists the
same ones. A page that several sequences list is never written: the writer takes a copy first.
A page that no sequence lists is free. So nothing is ever given back, and an operation that breaks
off anywhere, before a sequence has what it took, leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from runtime.errors import MemoryLimitError
from runtime.ops import PAGE


class Pages(NamedTuple):
    """The pages of one sequence, in order: a value, of which changes make another.

    The values of one sequence may have one `row`: what lies past `used` is nobody's, and where the
    next value puts its new pages.
    """

    row: np.ndarray  # int32 [most pages of the sequence]
    used: int = 0
    own: int = 0  # no other sequence holds the pages from this one on

    @classmethod
    def room(cls, capacity: int) -> Pages:
        """No pages, of a sequence of at most `capacity` tokens."""
        return cls(np.zeros(-(-capacity // PAGE), np.int32))

    @property
    def held(self) -> np.ndarray:
        """int32 physical pages in the order of the sequence, as kernels read them."""
        return self.row[: self.used]

    def writable(self, start: int, stop: int) -> bool:
        """Whether places start..stop-1 are known to have pages that nobody else holds."""
        return self.own * PAGE <= start and stop <= self.used * PAGE

    def slots(self, start: int, stop: int) -> np.ndarray:
        """int32 slot (page * PAGE + offset) of places start..stop-1."""
        places = np.arange(start, stop, dtype=np.int32)
        return self.row[places // PAGE] * PAGE + places % PAGE

    def slot(self, place: int) -> int:
        """The slot of one place."""
        return int(self.row[place // PAGE]) * PAGE + place % PAGE

    def cut(self, length: int) -> Pages:
        """Without pages past `length` tokens."""
        used = min(self.used, -(-length // PAGE))
        return Pages(self.row, used, min(self.own, used))

    def shared(self) -> Pages:
        """The same once another sequence may hold all of them."""
        return Pages(self.row, self.used, self.used)

    def copy(self) -> Pages:
        """The same pages for another sequence."""
        return Pages(self.row.copy(), self.used, self.used)


class PagePool:
    """`count` physical pages; `arrays` are the layers' memory, first axis = page.

    held: the pages of every sequence there is, each an int32 array of different pages.
    """

    def __init__(
        self, count: int, arrays: Sequence[np.ndarray], held: Callable[[], Iterable[np.ndarray]]
    ) -> None:
        self.count = count
        self._arrays, self._held = arrays, held

    def holders(self) -> np.ndarray:
        """int32 [count]: how many sequences hold each page."""
        found = np.zeros(self.count, np.int32)
        for pages in self._held():
            found[pages] += 1
        return found

    @property
    def free(self) -> int:
        """Pages that no sequence holds."""
        return int((self.holders() == 0).sum())

    def copy_too(self, arrays: Sequence[np.ndarray]) -> None:
        """From now on a copied page is copied in these arrays too; first axis = page."""
        self._arrays = [*self._arrays, *arrays]

    def prepare(self, wanted: Sequence[tuple[Pages, int, int]]) -> list[Pages]:
        """The same pages with places start..stop-1 of each writable.

        New pages, and copies of those that others hold as well; of several here that hold one
        page, the last may keep it if no other sequence does. The pages given stay as they were:
        nothing has happened until all sequences have what comes back. MemoryLimitError when there
        are not pages enough for all of them.
        """
        holders = self.holders()
        free = np.flatnonzero(holders == 0)[::-1].tolist()  # the first are used before the last
        return [self._prepare(pages, start, stop, holders, free) for pages, start, stop in wanted]

    def _prepare(
        self, pages: Pages, start: int, stop: int, holders: np.ndarray, free: list[int]
    ) -> Pages:
        first, end = start // PAGE, -(-stop // PAGE)
        row, held = pages.row, pages.row[first : min(pages.used, end)]
        shared = np.flatnonzero(holders[held] > 1) + first
        if len(shared):
            row = row.copy()
        for index in shared.tolist():
            page = int(row[index])
            row[index] = self._copy(page, self._take(free))
            holders[page] -= 1
        for index in range(pages.used, end):
            row[index] = self._take(free)
        return Pages(row, max(end, pages.used), min(pages.own, first))

    def _take(self, free: list[int]) -> int:
        if not free:
            raise MemoryLimitError(
                f"all {self.count} pages of the KV cache ({self.count * PAGE} tokens) are in use; "
                "close sessions or snapshots, or load the model with a larger `sequences` or a "
                "smaller `context`"
            )
        return free.pop()

    def _copy(self, page: int, copy: int) -> int:
        for array in self._arrays:
            array[copy] = array[page]
        return copy
