"""Pages of the KV cache: a sequence lists its own, in order.

A page holds PAGE tokens of every layer. A fork lists the same pages. A page that several hold is
never written: the writer takes a copy first. A page that nobody holds is free (see holders.py).
"""

from __future__ import annotations

from collections import abc
from typing import NamedTuple

import numpy as np

from runtime.errors import MemoryLimitError
from runtime.memory.holders import Evictable, Holders
from runtime.ops import PAGE

CopyPages = abc.Callable[[abc.Sequence[int], abc.Sequence[int]], None]


class Pages(NamedTuple):
    """The pages of one sequence, in order: a value, of which changes make another.

    The values of one sequence may have one `row`: what lies past `used` is nobody's, and where the
    next value puts its new pages.
    """

    row: np.ndarray  # int32 [most pages of the sequence]
    used: int = 0
    own: int = 0  # nobody else holds the pages from this one on, but for what was written already

    @classmethod
    def room(cls, capacity: int, shared: abc.Sequence[int] | np.ndarray = ()) -> Pages:
        """Those pages, which others hold too, of a sequence of at most `capacity` tokens."""
        row = np.zeros(-(-capacity // PAGE), np.int32)
        row[: len(shared)] = shared
        return cls(row, len(shared), len(shared))

    @property
    def held(self) -> np.ndarray:
        """int32 physical pages in the order of the sequence, as kernels read them."""
        return self.row[: self.used]

    def writable(self, start: int, stop: int) -> bool:
        """Whether places start..stop-1 are known to have pages that nobody else holds."""
        return self.own * PAGE <= start and stop <= self.used * PAGE

    def kv_slots(self, start: int, stop: int) -> np.ndarray:
        """int32 slot (page * PAGE + offset) of places start..stop-1."""
        places = np.arange(start, stop, dtype=np.int32)
        return self.row[places // PAGE] * PAGE + places % PAGE

    def kv_slot(self, place: int) -> int:
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
    """`count` physical pages of all layers; `copy_pages(sources, targets)` copies whole ones."""

    def __init__(self, count: int, copy_pages: CopyPages, holders: Holders) -> None:
        self.count = count
        self._copies, self._holders = [copy_pages], holders

    def holders(self, pinned: bool = False) -> np.ndarray:
        """int32 [count]: how many hold each page; pinned: not counting who could give it up."""
        found = np.zeros(self.count, np.int32)
        for holder in self._holders:
            if not (pinned and isinstance(holder, Evictable)):
                found[holder.held_pages()] += 1
        return found

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return int((self.holders() == 0).sum())

    @property
    def available(self) -> int:
        """Pages that are free or can be had: nobody holds them who cannot give them up."""
        return int((self.holders(pinned=True) == 0).sum())

    def prepare(
        self, wanted: abc.Sequence[tuple[Pages, int, int]]
    ) -> list[Pages | MemoryLimitError]:
        """The same pages with places start..stop-1 of each writable; an error where they are not
        to be had, and the others go on.

        New pages, and copies of those that others hold as well; of several here that hold one
        page, the last may keep it if nobody else does. The pages given stay as they were:
        nothing has happened until all sequences have what comes back.
        """
        holders, free = self._freed(wanted)
        return [self._prepare(pages, start, stop, holders, free) for pages, start, stop in wanted]

    def _freed(self, wanted: abc.Sequence[tuple[Pages, int, int]]) -> tuple[np.ndarray, list[int]]:
        """Holders and free pages, as many as are wanted where giving up helps."""
        while True:
            holders = self.holders()
            free = np.flatnonzero(holders == 0)[::-1].tolist()  # the first are used before the last
            missing = sum(_needed(*each, holders) for each in wanted) - len(free)
            if missing <= 0 or not self._holders.evict(missing, 0):
                return holders, free

    def _prepare(
        self, pages: Pages, start: int, stop: int, holders: np.ndarray, free: list[int]
    ) -> Pages | MemoryLimitError:
        shared, end = _shared(pages, start, stop, holders), -(-stop // PAGE)
        if len(shared) + max(0, end - pages.used) > len(free):
            return self._exhausted()
        row = pages.row.copy() if len(shared) else pages.row
        for index in shared.tolist():
            page = int(row[index])
            row[index] = self._copy(page, free.pop())
            holders[page] -= 1
        for index in range(pages.used, end):
            row[index] = free.pop()
        return Pages(row, max(end, pages.used), min(pages.own, start // PAGE))

    def _exhausted(self) -> MemoryLimitError:
        return MemoryLimitError(
            f"all {self.count} pages of the KV cache ({self.count * PAGE} tokens) are in use; "
            "close sessions or snapshots, or load the model with a larger `sequences` or a "
            "smaller `context`"
        )

    def _copy(self, page: int, copy: int) -> int:
        for copy_pages in self._copies:
            copy_pages([page], [copy])
        return copy


def _shared(pages: Pages, start: int, stop: int, holders: np.ndarray) -> np.ndarray:
    """Which of its pages of places start..stop-1, by number, somebody else holds too."""
    first, end = start // PAGE, min(-(-stop // PAGE), pages.own)
    return np.flatnonzero(holders[pages.row[first : min(pages.used, end)]] > 1) + first


def _needed(pages: Pages, start: int, stop: int, holders: np.ndarray) -> int:
    """The most pages that it takes to make places start..stop-1 writable."""
    return len(_shared(pages, start, stop, holders)) + max(0, -(-stop // PAGE) - pages.used)
