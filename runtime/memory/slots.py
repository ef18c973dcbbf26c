"""Slots of recurrent state, and what of its past a sequence keeps in them.

The state of a sequence is what its recurrent layers remember after some number of tokens. The
next step reads one slot and writes another, or the same one when nobody else holds it; so keeping
a state costs a slot and no copy. `Recurrent` is the state of one sequence, with some of its own
past ("checkpoints") to go back to.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import NamedTuple

from runtime.errors import MemoryLimitError
from runtime.memory.holders import Evictable, Holders

NONE = -1  # as `slot_in`: start from zeros
CHECKPOINTS = 8  # of one sequence, besides the state it is in
SPACING = 64  # tokens between checkpoints that no message end asks for
_MESSAGE_END = 4  # how much more a checkpoint at the end of a message is worth


class Checkpoint(NamedTuple):
    """The state after `place` tokens lies in `slot`."""

    place: int
    slot: int
    message_end: bool


class Recurrent(NamedTuple):
    """The recurrent state of one sequence: a value, of which changes make another.

    After `place` tokens it lies in `slot`. `place` may be less than the sequence is long: after a
    rewind to where no state was kept, the tokens from there on have to be evaluated again, and are
    in front of the next step.

    Checkpoints, in order: a state is kept where a message ends (a step of several tokens begins or
    ends) and every SPACING tokens or at the end of a piece of a longer prompt. Of more than
    CHECKPOINTS the one is dropped whose absence makes a rewind longer by the least share of its
    distance, so they thin out from the end in powers of two, message ends last.
    """

    slot: int = NONE
    place: int = 0
    checkpoints: tuple[Checkpoint, ...] = ()
    own: bool = False  # nobody else holds `slot`, no checkpoint of this sequence either

    @property
    def held(self) -> set[int]:
        """Every slot of it."""
        return {self.slot, *(c.slot for c in self.checkpoints)} - {NONE}

    def after(self, slot: int, place: int, message_end: bool = False) -> Recurrent:
        """What follows: the state after `place` tokens, which a step has written to `slot`."""
        found = Recurrent(slot, place, self.checkpoints, True)
        if message_end or place >= found.next_kept:
            return found.kept(message_end)
        return found

    def kept(self, message_end: bool) -> Recurrent:
        """With a checkpoint here, where there is none yet."""
        if self.place == self._last():
            if not message_end or not self.checkpoints:
                return self
            *before, last = self.checkpoints
            return self._replace(checkpoints=(*before, last._replace(message_end=True)))
        here = Checkpoint(self.place, self.slot, message_end)
        found = self._replace(checkpoints=(*self.checkpoints, here), own=False)
        if len(found.checkpoints) <= CHECKPOINTS:
            return found
        return found.without(least_missed(found.checkpoints, found.place))

    def without(self, checkpoint: Checkpoint) -> Recurrent:
        """Without a checkpoint that it may have."""
        return self._replace(checkpoints=tuple(c for c in self.checkpoints if c != checkpoint))

    @property
    def next_kept(self) -> int:
        """The place of the next state that is kept where no message end asks for one before."""
        return self._last() + SPACING

    def cut(self, length: int) -> Recurrent:
        """Back to the last state that is kept of at most `length` tokens."""
        kept = tuple(c for c in self.checkpoints if c.place <= length)
        if self.place <= length:
            return self._replace(checkpoints=kept)
        return self._replace(checkpoints=kept).lost()

    def lost(self) -> Recurrent:
        """Back to the last checkpoint: what `slot` has is no longer this sequence's."""
        last = self.checkpoints[-1] if self.checkpoints else Checkpoint(0, NONE, False)
        return Recurrent(last.slot, last.place, self.checkpoints)

    def shared(self) -> Recurrent:
        """The same once another sequence may hold it.

        The place becomes a checkpoint: who snapshots it or forks from it may well come back.
        """
        return self.kept(message_end=True)._replace(own=False)

    def alone(self) -> Recurrent:
        """Without its past, for a snapshot: it takes one slot however long it is kept."""
        return Recurrent(self.slot, self.place)

    def _last(self) -> int:
        return self.checkpoints[-1].place if self.checkpoints else 0


def least_missed(checkpoints: Sequence[Checkpoint], place: int) -> Checkpoint:
    """Of checkpoints in order, of a sequence whose state is at `place`."""
    places = [0, *(c.place for c in checkpoints), place + 1]

    def loss(i: int) -> float:
        gap = places[i + 2] - places[i]
        worth = _MESSAGE_END if checkpoints[i].message_end else 1
        return worth * gap / (places[-1] - places[i + 1])

    return checkpoints[min(range(len(checkpoints)), key=loss)]


class SlotPool:
    """`count` slots; each holds the recurrent and convolution state of all layers."""

    def __init__(self, count: int, holders: Holders) -> None:
        self.count = count
        self._holders = holders

    @property
    def free(self) -> int:
        """Slots that nobody holds."""
        return self.count - len(set[int]().union(*(h.held_slots() for h in self._holders)))

    @property
    def available(self) -> int:
        """Slots that are free or can be had: nobody holds them who cannot give them up."""
        pinned = (h.held_slots() for h in self._holders if not isinstance(h, Evictable))
        return self.count - len(set[int]().union(*pinned))

    def take(self, used: Set[int]) -> int | None:
        """A slot that is not among those in use, if there is one."""
        return next((slot for slot in range(self.count) if slot not in used), None)

    def exhausted(self) -> MemoryLimitError:
        """What to say when there is none."""
        return MemoryLimitError(
            f"all {self.count} slots of recurrent state are in use; close sessions or snapshots, "
            "or load the model with a larger `sequences`"
        )
