"""Slots of recurrent state: one per sequence or snapshot, shared by count, never written shared."""

from __future__ import annotations

import threading

from runtime.errors import MemoryLimitError

NONE = -1  # as `slot_in`: start from zeros


class SlotPool:
    """`count` slots; each holds the recurrent and convolution state of all layers."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._lock = threading.RLock()
        self._holders = [0] * count
        self._free = list(range(count - 1, -1, -1))

    @property
    def free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    def allocate(self) -> int:
        """A slot with one holder; MemoryLimitError when all are held."""
        with self._lock:
            if not self._free:
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

    def writable(self, slot: int) -> int:
        """Where the successor of the state in `slot` may be written: itself, or a new slot."""
        with self._lock:
            if slot != NONE and self._holders[slot] == 1:
                return slot
            return self.allocate()
