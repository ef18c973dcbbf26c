"""Slots of recurrent state: one per sequence or snapshot, shared by count, never written shared.

The state of a sequence is what its recurrent layers remember after some number of tokens. The
next step reads one slot and writes another, or the same one when nobody else holds it; so keeping
a state costs a slot and no copy. `Recurrent` is the state of one sequence, with some of its own
past ("checkpoints") to go back to.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from runtime.backends import forks
from runtime.errors import MemoryLimitError

NONE = -1  # as `slot_in`: start from zeros
CHECKPOINTS = 8  # of one sequence, besides the state it is in
SPACING = 64  # tokens between checkpoints that no message end asks for
_MESSAGE_END = 4  # how much more a checkpoint at the end of a message is worth


class SlotPool:
    """`count` slots; each holds the recurrent and convolution state of all layers.

    Checkpoints give way: when no slot is free, the least useful of all sequences is dropped.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._users: weakref.WeakSet[Recurrent] = weakref.WeakSet()
        self._lock = forks.lock()
        self._holders = [0] * count
        self._free = list(range(count - 1, -1, -1))
        self._abandoned: deque[int] = deque()

    @property
    def free(self) -> int:
        """Slots that nobody holds."""
        with self._lock:
            while self._abandoned:
                self.release(self._abandoned.popleft())
            return len(self._free)

    def allocate(self) -> int:
        """A slot with one holder; MemoryLimitError when all are held."""
        with self._lock:
            while not self.free:
                if not self._drop_checkpoint():
                    raise MemoryLimitError(
                        f"all {self.count} slots of recurrent state are in use; close sessions or "
                        "snapshots, or load the model with a larger `sequences`"
                    )
            slot = self._free.pop()
            self._holders[slot] = 1
            return slot

    def share(self, slot: int) -> int:
        """One more holder; NONE stays NONE."""
        with self._lock:
            if slot != NONE:
                self._holders[slot] += 1
            return slot

    def release(self, slot: int) -> None:
        """One holder less; a slot without holders is free again."""
        with self._lock:
            if slot != NONE:
                self._holders[slot] -= 1
                if self._holders[slot] == 0:
                    self._free.append(slot)

    def abandon(self, slot: int) -> None:
        """`release` at the next opportunity: safe where a garbage collection may call."""
        self._abandoned.append(slot)

    def writable(self, slot: int) -> int:
        """Where the successor of the state in `slot` may be written: itself, or a new slot."""
        with self._lock:
            while slot == NONE or self._holders[slot] > 1:
                if self.free or not self._drop_checkpoint():
                    return self.allocate()
            return slot

    def register(self, user: Recurrent) -> None:
        """Count a sequence among those whose checkpoints may be dropped."""
        with self._lock:
            self._users.add(user)

    def _drop_checkpoint(self) -> bool:
        fullest = max(self._users, key=lambda user: len(user.checkpoints), default=None)
        return fullest is not None and fullest.thin()


@dataclass(frozen=True)
class Checkpoint:
    """The state after `place` tokens lies in `slot`."""

    place: int
    slot: int
    message_end: bool


class Recurrent:
    """The recurrent state of one sequence: after `place` tokens it lies in `slot`.

    `place` may be less than the sequence is long: after a rewind to where no state was kept, the
    tokens from there on have to be evaluated again, and are in front of the next step.

    Checkpoints: a state is kept where a message ends (a step of several tokens begins or ends)
    and every SPACING tokens or at the end of a piece of a longer prompt. Of more than CHECKPOINTS
    the one is dropped whose absence makes a rewind longer by the least share of its distance, so
    they thin out from the end in powers of two, message ends last.
    """

    def __init__(self, pool: SlotPool, slot: int = NONE, place: int = 0) -> None:
        self.pool, self.slot, self.place = pool, slot, place
        self.checkpoints: list[Checkpoint] = []
        self._next = NONE  # where the step under way writes
        self._running = False
        pool.register(self)

    def reserve(self) -> None:
        """Take a slot for the next step; MemoryLimitError when there is none."""
        if self._next == NONE:
            self._next = self.pool.writable(self.slot)

    def cancel(self) -> None:
        """Give back what `reserve` took, when the step did not begin."""
        if not self._running:
            if self._next != self.slot:
                self.pool.release(self._next)
            self._next = NONE

    def begin(self) -> tuple[int, int]:
        """A step begins; the slots that it reads and writes."""
        self.reserve()
        self._running = True
        return self.slot, self._next

    def end(self, place: int, message_end: bool = False) -> None:
        """The step has ended and the state is that after `place` tokens."""
        old, self.slot, self.place = self.slot, self._next, place
        if old != self.slot:
            self.pool.release(old)
        self._next, self._running = NONE, False
        if message_end or place - self._last() >= SPACING:
            self.keep(message_end)

    def keep(self, message_end: bool) -> None:
        """A checkpoint here, where there is none yet."""
        if self.place == self._last():
            if message_end and self.checkpoints:
                self.checkpoints[-1] = replace(self.checkpoints[-1], message_end=True)
            return
        slot = self.pool.share(self.slot)
        self.checkpoints.append(Checkpoint(self.place, slot, message_end))
        if len(self.checkpoints) > CHECKPOINTS:
            self.thin()

    def thin(self) -> bool:
        """Drop the checkpoint that is missed least; False when there is none."""
        if not self.checkpoints:
            return False
        places = [0, *(c.place for c in self.checkpoints), self.place + 1]

        def loss(i: int) -> float:
            gap = places[i + 2] - places[i]
            worth = _MESSAGE_END if self.checkpoints[i].message_end else 1
            return worth * gap / (places[-1] - places[i + 1])

        index = min(range(len(self.checkpoints)), key=loss)
        self.pool.release(self.checkpoints.pop(index).slot)
        return True

    def rewind(self, length: int) -> None:
        """Back to the last state that is kept of at most `length` tokens; ends a broken step."""
        lost = self._running and self._next == self.slot
        if self._running and not lost:
            self.pool.release(self._next)
        if not self._running:
            self.cancel()
        self._next, self._running = NONE, False
        while self.checkpoints and self.checkpoints[-1].place > length:
            self.pool.release(self.checkpoints.pop().slot)
        if lost or self.place > length:
            self.pool.release(self.slot)
            last = self.checkpoints[-1] if self.checkpoints else Checkpoint(0, NONE, False)
            self.slot, self.place = self.pool.share(last.slot), last.place

    def fork(self) -> Recurrent:
        """The same state and checkpoints, held once more."""
        other = self.still()
        for checkpoint in self.checkpoints:
            self.pool.share(checkpoint.slot)
        other.checkpoints = list(self.checkpoints)
        return other

    def still(self) -> Recurrent:
        """The same state without its past, for a snapshot: it takes one slot however long kept.

        The place becomes a checkpoint: who snapshots it or forks from it may well come back.
        """
        self.keep(message_end=True)
        return Recurrent(self.pool, self.pool.share(self.slot), self.place)

    def restore(self, other: Recurrent, same: int) -> None:
        """Go on from the state of `other`; checkpoints of the first `same` tokens stay."""
        slot = self.pool.share(other.slot)
        self.rewind(min(same, other.place))
        self.pool.release(self.slot)
        self.slot, self.place = slot, other.place
        self.keep(message_end=True)

    def close(self) -> None:
        """Give back every slot."""
        self.rewind(0)

    def abandon(self) -> None:
        """Give back every slot, whenever the pool is next asked."""
        for slot in (self.slot, *(c.slot for c in self.checkpoints)):
            self.pool.abandon(slot)
        if self._next != self.slot:
            self.pool.abandon(self._next)

    def _last(self) -> int:
        return self.checkpoints[-1].place if self.checkpoints else 0


def reserve(states: Sequence[Recurrent]) -> None:
    """Slots for the next step of all of these, or MemoryLimitError and nothing has changed."""
    try:
        for state in states:
            state.reserve()
    except MemoryLimitError:
        for state in states:
            state.cancel()
        raise
