"""What a step makes of its sessions: prepared beside them, and put in place in one go at its end.

The sessions' records stay as they are while a step runs. What it takes is known to its `Advance`s
alone, and is free again when they are forgotten. Only one step or other change of a model's
sessions is under way at a time (see `Model._alone`), so nothing else takes it meanwhile.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import repeat

import numpy as np

from runtime.memory.pages import PagePool
from runtime.memory.slots import NONE, Checkpoint, Recurrent, SlotPool, least_missed
from runtime.session import Holder, Record, Session


class Keeper:
    """A sequence, and the slots of recurrent state that it holds."""

    __slots__ = ("sequence",)

    def __init__(self, sequence: Holder) -> None:
        self.sequence = sequence

    def states(self) -> list[Recurrent]:
        """What it is, and where a step is under way what it is going to be."""
        state = self.sequence._record.state
        return [] if state is None else [state]

    @property
    def held(self) -> set[int]:
        """Slots that nobody else may write."""
        return set[int]().union(*(state.held for state in self.states()))

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Its checkpoints, in order."""
        return sorted({c for state in self.states() for c in state.checkpoints})

    def drop_checkpoint(self) -> None:
        """One less: the one that is missed least."""
        place = max(state.place for state in self.states())
        self.drop(least_missed(self.checkpoints, place))

    def drop(self, checkpoint: Checkpoint) -> None:
        """Not this one any more."""
        record = self.sequence._record
        assert record.state is not None, "who has a checkpoint has a state"
        self.sequence._record = record._replace(state=record.state.without(checkpoint))


class Advance(Keeper):
    """A session on its way through a step: `ids` are evaluated from place `start` on.

    The first ones may be tokens that the session has already; `new` of them it has not. `state`
    and `slot_out`: what its recurrent layers read and write next.
    """

    __slots__ = ("before", "ids", "new", "pages", "slot_out", "start", "state", "stop")

    def __init__(self, session: Session, ids: list[int]) -> None:
        self.sequence, self.new = session, len(ids)
        self.before = record = session._record
        self.pages, self.state, self.slot_out = record.pages, record.state, NONE
        self.stop = record.length + self.new  # how many tokens it will have
        self.start, self.ids = record.length, ids
        if self.state is not None:
            self.start = self.state.place
            if self.start < record.length:
                self.ids = record.tokens[self.start : record.length] + ids
            elif self.new > 1:
                self.state = self.state.kept(message_end=True)

    @property
    def slots(self) -> tuple[int, int]:
        """The slots that the next step reads and writes, of models with recurrent layers."""
        assert self.state is not None, "only recurrent layers have slots"
        return self.state.slot, self.slot_out

    def end(self, place: int, message_end: bool) -> None:
        """The device has evaluated the tokens up to `place`."""
        if self.state is not None:
            self.state = self.state.after(self.slot_out, place, message_end)
            self.slot_out = NONE

    def begun(self) -> Record | None:
        """What the session is while the device writes; None where that is what it was.

        The same tokens, but pages of its own in place of shared ones, and not the state that is
        written over.
        """
        tokens, length, pages, state, _ = self.sequence._record
        over = state is not None and self.slot_out == state.slot != NONE
        if self.pages.row is not pages.row:
            pages = self.pages.cut(length)
        elif not over:
            return None
        if over and state is not None:
            state = state.lost()
        return Record(tokens, length, pages, state)

    def done(self) -> Record:
        """What the session is when the step has ended."""
        if self.sequence._record.closed:
            return self.sequence._record
        tokens, length = self.before.tokens, self.before.length
        del tokens[length:]
        tokens.extend(self.ids[-self.new :])
        return Record(tokens, self.stop, self.pages, self.state)

    def states(self) -> list[Recurrent]:
        """See Keeper."""
        return super().states() if self.state is None else [*super().states(), self.state]

    @property
    def held(self) -> set[int]:
        """See Keeper."""
        return super().held | {self.slot_out} - {NONE}

    def drop(self, checkpoint: Checkpoint) -> None:
        """See Keeper."""
        super().drop(checkpoint)
        if self.state is not None:
            self.state = self.state.without(checkpoint)


def begin(advances: Sequence[Advance]) -> None:
    """The device is about to write: no session may count any more on what is written over."""
    begun = [a.begun() for a in advances]
    if any(begun):
        _store(
            advances, [new or a.sequence._record for a, new in zip(advances, begun, strict=True)]
        )


def commit(advances: Sequence[Advance]) -> None:
    """The step has ended: its sessions are what it made of them, all at once."""
    _store(advances, [a.done() for a in advances])


def _store(advances: Sequence[Advance], records: Sequence[Record]) -> None:
    sequences = [a.sequence for a in advances]
    # `map` calls `setattr` without a line of Python between, so no interrupt comes between.
    deque(map(setattr, sequences, repeat("_record"), records), maxlen=0)


class Sequences:
    """The sessions and snapshots of a model, and the pools of memory that they hold parts of."""

    def __init__(self, n_pages: int, arrays: Sequence[np.ndarray], n_slots: int) -> None:
        # No `WeakSet`: an interrupt in the Python code that it runs when a member dies would be
        # lost. Not of this object but of the list: pools that referred to it would not be freed.
        self._members = members = list[weakref.ref[Holder]]()
        self.pages = PagePool(n_pages, arrays, partial(_held_pages, members))
        self.slots = SlotPool(n_slots, partial(_held_slots, members))

    def add(self, member: Holder) -> None:
        """From now on what its record says is held."""
        alive = [ref for ref in self._members if ref() is not None]
        self._members[:] = [*alive, weakref.ref(member)]

    def members(self) -> list[Holder]:
        """Those that somebody knows, closed ones among them."""
        return _alive(self._members)

    def prepare(self, batch: Iterable[tuple[Session, list[int]]]) -> list[Advance]:
        """Memory for all tokens of a step; MemoryLimitError when there is not enough."""
        advances = [Advance(session, ids) for session, ids in batch]
        if not all(a.pages.writable(a.start, a.stop) for a in advances):
            pages = self.pages.prepare([(a.pages, a.start, a.stop) for a in advances])
            for advance, prepared in zip(advances, pages, strict=True):
                advance.pages = prepared
        self.reserve(advances, advances)
        return advances

    def reserve(self, some: Iterable[Advance], advances: Sequence[Advance]) -> None:
        """Slots for what some of the `advances` under way write next, where there are none yet."""
        if not self.slots.count:
            return
        for advance in some:
            state = advance.state
            if state is not None and advance.slot_out == NONE:
                advance.slot_out = state.slot if state.own else self._slot(advance, advances)

    def _slot(self, advance: Advance, advances: Sequence[Advance]) -> int:
        """The slot its state is in where nobody else holds that, else one that nobody holds.

        Checkpoints give way: when no slot is free, the least useful of all sequences is dropped.
        """
        assert advance.state is not None, "only recurrent layers have slots"
        own, keepers = advance.state.slot, self._keepers(advances)
        while True:
            others = set[int]().union(*(k.held for k in keepers if k is not advance))
            if own not in others | {NONE} | {c.slot for c in advance.checkpoints}:
                return own
            free = self.slots.take(others | advance.held)
            if free is not None:
                return free
            fullest = max(keepers, key=lambda keeper: len(keeper.checkpoints))
            if not fullest.checkpoints:
                raise self.slots.exhausted()
            fullest.drop_checkpoint()

    def _keepers(self, advances: Sequence[Advance] = ()) -> list[Keeper]:
        """Every sequence once: those in a step as they are there."""
        under_way = {advance.sequence for advance in advances}
        return [*advances, *(Keeper(m) for m in self.members() if m not in under_way)]


def _alive(members: Iterable[weakref.ref[Holder]]) -> list[Holder]:
    return [member for ref in members if (member := ref()) is not None]


def _held_pages(members: Iterable[weakref.ref[Holder]]) -> list[np.ndarray]:
    return [member._record.pages.held for member in _alive(members)]


def _held_slots(members: Iterable[weakref.ref[Holder]]) -> list[set[int]]:
    return [Keeper(member).held for member in _alive(members)]
