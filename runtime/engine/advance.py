"""What a step makes of its sequences: prepared beside them, and put in place in one go at its end.

The records of the sequences stay as they are while a step runs. What it takes is known to its
`Advance`s alone, and is free again when they are forgotten. Only one step or other change of a
model's sequences is under way at a time (see `Engine.alone`), so nothing else takes it meanwhile.
"""

from __future__ import annotations

from collections import abc, deque
from itertools import repeat
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from runtime.engine.drafted import Drafted
from runtime.engine.sequence import Record, Rows, Sequence
from runtime.errors import Error
from runtime.memory.slots import NONE, Checkpoint
from runtime.ops import PAGE

_SEEN = 32  # hidden rows that a sequence keeps: more than a step has drafts
_NOTHING: abc.Mapping[str, np.ndarray] = MappingProxyType({})


class Piece(NamedTuple):
    """New tokens of one sequence, and which of their rows of logits are wanted.

    rows: "none", "last" or "all" of them, or places in `ids`, rising. opens, closes: whether a
    message begins before the first or ends with the last of them, so that a recurrent state is
    worth keeping there; by default where there are several.
    given: what the tokens come with, a row each: "positions", int32 [len(ids)] or [len(ids),
    components], by default their places; "vectors", float32 [len(ids), hidden], whose rows stand
    for the embeddings of ids below 0 (by which the sequence knows such tokens).
    drafted: `ids` after the first are drafts, which the sequence has once this says so.
    """

    sequence: Sequence
    ids: list[int]
    rows: str | abc.Sequence[int] = "last"
    opens: bool | None = None
    closes: bool | None = None
    given: abc.Mapping[str, np.ndarray] = _NOTHING
    drafted: Drafted | None = None

    def wanted(self) -> abc.Sequence[int]:
        """Places in `ids`."""
        n, rows = len(self.ids), self.rows
        if not isinstance(rows, str):
            return rows
        return range(0 if rows == "all" else n - (rows == "last"), n)


class Advance:
    """A sequence on its way through a step: `ids` are evaluated from place `start` on.

    The first ones may be tokens that it has already; `new` of them it has not. `wanted`: of which
    of `ids` logits are wanted. `state` and `slot_out`: what its recurrent layers read and write
    next. `given`: see Piece. `rows`: float32 [len(wanted), vocabulary], as far as they are taken.
    `error`: why it cannot go on, while others do.
    """

    __slots__ = (
        "_filled", "before", "closes", "drafted", "error", "given", "ids", "new", "pages", "rows",
        "seen", "sequence", "slot_out", "start", "state", "stop", "wanted",
    )  # fmt: skip

    error: Error | None
    rows: np.ndarray

    def __init__(self, piece: Piece) -> None:
        self.sequence, self.new = piece.sequence, len(piece.ids)
        self.before = record = piece.sequence.record
        self.pages, self.state, self.slot_out = record.pages, record.state, NONE
        self.stop = record.length + self.new  # how many tokens it will have
        self.start, self.ids, self.wanted = record.length, piece.ids, piece.wanted()
        self.closes = self.new > 1 if piece.closes is None else piece.closes
        self.given, self.error, self._filled = piece.given, None, 0
        self.drafted = piece.drafted if self.new > 1 else None
        self.seen: Rows | None = None
        if self.state is not None:
            self.start = self.state.place
            if self.start < record.length:
                again = record.length - self.start
                self.ids = record.tokens[self.start : record.length] + piece.ids
                self.wanted = [again + i for i in self.wanted]
            elif self.new > 1 if piece.opens is None else piece.opens:
                self.state = self.state.kept(message_end=True)

    @property
    def slots(self) -> tuple[int, int]:
        """The slots that the next step reads and writes, of models with recurrent layers."""
        assert self.state is not None, "only recurrent layers have slots"
        return self.state.slot, self.slot_out

    def take(self, rows: np.ndarray, copy: bool = True) -> None:
        """The next of its rows; there may be none. Those that are all need not be copied."""
        if not copy and len(rows) == len(self.wanted):
            self.rows, self._filled = rows, len(rows)
            return
        if not self._filled:
            self.rows = np.empty((len(self.wanted), rows.shape[1]), np.float32)
        end = self._filled + len(rows)
        self.rows[self._filled : end] = rows
        self._filled = end

    def see(self, rows: np.ndarray) -> None:
        """The hidden rows of what it has just taken; kept are those up to its last token."""
        wanted = self.wanted[: self._filled]
        if not len(rows) or wanted[-1] != len(self.ids) - 1:
            return
        n = 1
        while n < min(len(rows), _SEEN) and wanted[-n - 1] == wanted[-n] - 1:
            n += 1
        self.seen = Rows(self.stop - n, rows[len(rows) - n :].copy())

    def end(self, place: int, message_end: bool) -> None:
        """The device has evaluated the tokens up to `place`."""
        if self.state is not None:
            self.state = self.state.after(self.slot_out, place, message_end)
            self.slot_out = NONE

    def begun(self) -> Record | None:
        """What the sequence is while the device writes; None where that is what it was.

        The same tokens, but pages of its own in place of shared ones, and not the state that is
        written over.
        """
        record = self.sequence.record
        length, pages, state = record.length, record.pages, record.state
        over = state is not None and self.slot_out == state.slot != NONE
        if self.pages.row is not pages.row:
            pages = self.pages.cut(length)
        elif not over:
            return None
        if over and state is not None:
            state = state.lost()
        return record._replace(pages=pages, state=state)

    def done(self) -> Record:
        """What the sequence is when the step has ended."""
        if self.sequence.record.closed:
            return self.sequence.record
        tokens, length, keys = self.before.tokens, self.before.length, self.before.keys
        del tokens[length:], keys[length // PAGE :]
        tokens.extend(self.ids[len(self.ids) - self.new :])
        given = self.stop if self.given else self.before.given
        seen = self.seen if self.new else self.before.seen
        branches = tuple(place for place in self.before.branches if place > self.stop)
        whole = Record(
            tokens, self.stop, self.pages, keys, self.state,
            branches=branches, given=given, seen=seen,
        )  # fmt: skip
        if self.drafted is None:
            return whole
        return self.drafted.evaluated(whole, self.ids[1 - self.new :])

    def held_slots(self) -> set[int]:
        """What the sequence holds, and what the step takes beside."""
        state = set() if self.state is None else self.state.held
        return self.sequence.held_slots() | state | {self.slot_out} - {NONE}

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Those of the sequence, and those it is going to have."""
        state = () if self.state is None else self.state.checkpoints
        return sorted({*self.sequence.checkpoints, *state})

    def drop(self, checkpoint: Checkpoint) -> None:
        """Keep this one no longer, neither now nor after the step."""
        self.sequence.drop(checkpoint)
        if self.state is not None:
            self.state = self.state.without(checkpoint)

    @property
    def evaluated(self) -> int:
        """How far its states reach."""
        assert self.state is not None, "only recurrent layers have states"
        return max(self.state.place, self.before.evaluated)


def begin(advances: abc.Sequence[Advance]) -> None:
    """The device is about to write: nobody may count any more on what is written over."""
    begun = [a.begun() for a in advances]
    if any(begun):
        store(
            [a.sequence for a in advances],
            [new or a.sequence.record for a, new in zip(advances, begun, strict=True)],
        )


def commit(advances: abc.Sequence[Advance]) -> None:
    """The step has ended: its sequences are what it made of them, all at once."""
    store([a.sequence for a in advances], [a.done() for a in advances])


def store(sequences: abc.Sequence[Sequence], records: abc.Iterable[Record]) -> None:
    """A record for each sequence, all at once."""
    # `map` calls `setattr` without a line of Python between, so no interrupt comes between.
    deque(map(setattr, sequences, repeat("record"), records), maxlen=0)
