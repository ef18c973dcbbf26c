"""Pools: the pages and slots of a model, and who holds which of them."""

from __future__ import annotations

from collections import abc
from collections.abc import Iterable

from runtime.engine.advance import Advance
from runtime.engine.sequence import Sequence
from runtime.errors import MemoryLimitError
from runtime.memory.holders import Evictable, Holder, Holders
from runtime.memory.pages import CopyPages, PagePool
from runtime.memory.slots import NONE, SlotPool, least_missed


class Pools:
    """`pages` and `slots` of a model, and their `holders`."""

    def __init__(self, n_pages: int, copy_pages: CopyPages, n_slots: int) -> None:
        self.holders = Holders()
        self.pages = PagePool(n_pages, copy_pages, self.holders)
        self.slots = SlotPool(n_slots, self.holders)

    def reserve(self, advances: abc.Sequence[Advance]) -> None:
        """Memory for all tokens of a step; who cannot have it gets an `error` and takes nothing.

        Slots first: who has no slot must not have pages that another one would leave to it.
        """
        going = [a for a in advances if a.error is None]
        if self.slots.count:
            self.reserve_slots(going, going)
            going = [a for a in advances if a.error is None]
        if all(a.pages.writable(a.start, a.stop) for a in going):
            return
        found = self.pages.prepare([(a.pages, a.start, a.stop) for a in going])
        for advance, pages in zip(going, found, strict=True):
            if isinstance(pages, MemoryLimitError):
                advance.error = pages
            else:
                advance.pages = pages

    def reserve_slots(self, some: Iterable[Advance], advances: abc.Sequence[Advance]) -> None:
        """Slots for what some of the `advances` under way write next, where there are none yet."""
        if not self.slots.count:
            return
        for advance in some:
            state = advance.state
            if state is not None and advance.slot_out == NONE and advance.error is None:
                own = state.own and advance.drafted is None
                advance.slot_out = state.slot if own else self._slot(advance, advances)

    def free_slots(self, wanted: int) -> list[int]:
        """At least one slot that nobody holds, and as many of those wanted as there are to be had.

        Who can is asked to give some up. MemoryLimitError: there is none.
        """
        while True:
            used = _slots_of(self.holders)
            free = [slot for slot in range(self.slots.count) if slot not in used][:wanted]
            if len(free) == wanted or not self.holders.evict(0, wanted - len(free)):
                break
        while not free:
            if not _drop_checkpoint(self.holders):
                raise self.slots.exhausted()
            free = self.free_slots(1)
        return free

    def _slot(self, advance: Advance, advances: abc.Sequence[Advance]) -> int:
        """The slot its state is in where nobody else holds that, else one that nobody holds.

        When none is free, who can is asked to give one up; then the least useful checkpoint of
        all sequences gives way; last the hold of who can do without it on its own slot. Drafts
        leave the state from before them in its slot, and no checkpoint gives way to them.
        """
        assert advance.state is not None, "only recurrent layers have slots"
        own = advance.state.slot
        under_way = {a.sequence for a in advances}
        while True:
            rest = [h for h in self.holders if h not in under_way]
            others = _slots_of(rest) | _slots_of(a for a in advances if a is not advance)
            elsewhere = others | {NONE} | {c.slot for c in advance.checkpoints}
            if advance.drafted is None and own not in elsewhere:
                return own
            free = self.slots.take(others | advance.held_slots())
            if free is not None:
                return free
            if self.holders.evict(0, 1):
                continue
            if advance.drafted is None and _drop_checkpoint([*advances, *rest]):
                continue
            if advance.drafted is None and _let_go(own, [*advances, *rest], advance):
                continue
            advance.error = self.slots.exhausted()
            return NONE


def _slots_of(holders: Iterable[Holder | Advance]) -> set[int]:
    return set[int]().union(*(h.held_slots() for h in holders))


def _let_go(slot: int, holders: abc.Sequence[Holder | Advance], own: Advance) -> bool:
    """Have those who can do without a slot leave it to its owner; False: others need it, too."""
    can = [h for h in holders if isinstance(h, Evictable)]
    if slot in _slots_of(h for h in holders if h is not own and h not in can):
        return False
    return sum(h.let_go(slot) for h in can) > 0


def _drop_checkpoint(holders: Iterable[Holder | Advance]) -> bool:
    """Of who has most of them the one that is missed least; False where nobody has any."""
    keepers = [h for h in holders if isinstance(h, Advance | Sequence)]
    fullest = max(keepers, key=lambda keeper: len(keeper.checkpoints), default=None)
    if fullest is None or not fullest.checkpoints:
        return False
    fullest.drop(least_missed(fullest.checkpoints, fullest.evaluated))
    return True
