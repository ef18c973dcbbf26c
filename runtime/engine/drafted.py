"""Drafts: tokens behind the end of a sequence, evaluated before it is known whether they follow.

The sequence has none of them at first. As they turn out to follow it has one after the other, as
if each had been evaluated when it was wanted; the others never were.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed
from typing import TYPE_CHECKING

import numpy as np

from runtime.engine.sequence import Record, Sequence
from runtime.memory.holders import Evictable

if TYPE_CHECKING:
    from runtime.engine.engine import Engine

_NO_PAGES = np.zeros(0, np.int32)
_NO_ROWS = np.zeros((0, 0), np.float32)


class Drafted(Evictable):
    """What was evaluated behind the end of one sequence, until that goes on in another way.

    It holds the pages, and the state behind all of them, that the sequence does not hold yet.
    """

    __slots__ = ("_engine", "_ids", "_record", "_rows", "_sequence", "_whole")

    def __init__(self, engine: Engine, sequence: Sequence) -> None:
        self._engine, self._sequence = engine, sequence
        self._whole: Record | None = None
        self._record: Record | None = None
        self._ids, self._rows = list[int](), _NO_ROWS
        with engine.alone():
            engine.pools.holders.add(self)

    def evaluated(self, whole: Record, drafts: Listed[int]) -> Record:
        """A step has evaluated `drafts`, the last tokens of `whole`; its sequence without them.

        Of recurrent layers only the state behind all of them is there: before, the state is the
        one that the step began with.
        """
        length = whole.length - len(drafts)
        first = whole._replace(
            length=length, pages=whole.pages.cut(length), state=self._sequence.record.state
        )
        self._rows = _NO_ROWS
        self._ids, self._record, self._whole = list(drafts), first, whole
        return first

    def follow(self, rows: np.ndarray) -> None:
        """The logits behind the drafts, float32 [drafts, vocabulary]."""
        self._rows = rows

    def take(self, token: int) -> np.ndarray | None:
        """The logits behind `token`, which the sequence has from now on, if it is the next draft.

        None: it is to be evaluated, and what was drafted is forgotten.
        """
        if self._whole is None:
            return None
        with self._engine.alone():
            found = self._rest()
            at = 0 if found is None else len(self._ids) - (found[1].length - found[0].length)
            if found is None or self._ids[at : at + 1] != [token] or len(self._rows) <= at:
                self.forget()
                return None
            record, whole = found
            length = record.length + 1
            state = record.state if length < whole.length else whole.state
            after = record._replace(length=length, pages=whole.pages.cut(length), state=state)
            self._sequence.record = after
            self._record = after
            self._engine.keep(self._sequence)
            return self._rows[at]

    def forget(self) -> None:
        """The rest will not follow."""
        self._whole = self._record = None

    def _rest(self) -> tuple[Record, Record] | None:
        """What the sequence is and may become; None where it went another way."""
        record, whole = self._sequence.record, self._whole
        return None if whole is None or record is not self._record else (record, whole)

    def held_pages(self) -> np.ndarray:
        """See Holder."""
        found = self._rest()
        return _NO_PAGES if found is None else found[1].pages.held[found[0].pages.used :]

    def held_slots(self) -> set[int]:
        """See Holder."""
        found = self._rest()
        if found is None or found[0].state is None or found[1].state is None:
            return set()
        return found[1].state.held - found[0].state.held

    def evict(self, pages: int, slots: int) -> bool:
        """See Evictable."""
        found = self._whole is not None
        self.forget()
        return found

    def close(self) -> None:
        """See Holder."""
        self.forget()
