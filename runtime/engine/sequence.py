"""Sequence: tokens, the pages of their keys and values, and their recurrent state."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from runtime.memory.holders import Holder
from runtime.memory.pages import Pages
from runtime.memory.slots import Checkpoint, Recurrent
from runtime.ops import PAGE


class Rows(NamedTuple):
    """Hidden rows, float32 [n, hidden], of the last tokens that a step evaluated; place of the
    first of them."""

    start: int
    rows: np.ndarray


class Record(NamedTuple):
    """Everything about a sequence that changes, as one value.

    A change makes another record and puts it in place by one store. So whatever breaks off a
    change, at any point, leaves the old record or the new one; and what pages and slots are held
    is what the records of the open sequences say.
    """

    tokens: list[int]  # past `length`: nobody's, where the next record puts its tokens
    length: int
    pages: Pages
    keys: list[bytes]  # of its first whole blocks (see prefix_tree.block_keys), as far as known
    state: Recurrent | None = None  # of models with recurrent layers
    closed: bool = False
    branches: tuple[int, ...] = ()  # where others go on in another way: states are wanted there
    given: int = 0  # tokens up to here came with what is not kept: vectors, positions of their own
    seen: Rows | None = None  # of models that predict further tokens

    @property
    def evaluated(self) -> int:
        """How many tokens the next step need not evaluate."""
        return self.length if self.state is None else self.state.place

    @property
    def last_row(self) -> np.ndarray | None:
        """The hidden row of its last token, float32 [hidden], where that is known."""
        if self.seen is None:
            return None
        at = self.length - 1 - self.seen.start
        return self.seen.rows[at] if 0 <= at < len(self.seen.rows) else None

    def cut(self, length: int) -> Record:
        """Without what is past `length` tokens."""
        if length == self.length:
            return self
        state = None if self.state is None else self.state.cut(length)
        pages = self.pages.cut(length).shared()  # a cache may hold what is going to be written over
        given = min(self.given, length)
        return self._replace(length=length, pages=pages, state=state, branches=(), given=given)

    def shared(self) -> Record:
        """The same once somebody else may hold its pages and slots."""
        state = None if self.state is None else self.state.shared()
        return self._replace(pages=self.pages.shared(), state=state)

    def copy(self) -> Record:
        """The same for another sequence; this one has to be `shared`."""
        keys = self.keys[: self.length // PAGE]
        tokens = self.tokens[: self.length]
        return self._replace(tokens=tokens, pages=self.pages.copy(), keys=keys)

    def without_memory(self) -> Record:
        """What is left of it when it is closed."""
        state = None if self.state is None else Recurrent()
        return Record(self.tokens, self.length, Pages.room(0), self.keys, state, True)


class Sequence(Holder):
    """Holds what its record says, until it is closed or forgotten.

    `closed_error`: what to say to who goes on with it when it is closed. `cached`: whether the
    cache of prompts takes what it evaluates.
    """

    __slots__ = ("cached", "closed_error", "record")

    def __init__(self, record: Record, closed_error: str, cached: bool = True) -> None:
        self.record, self.closed_error, self.cached = record, closed_error, cached

    def held_pages(self) -> np.ndarray:
        """See Holder."""
        return self.record.pages.held

    def held_slots(self) -> set[int]:
        """See Holder."""
        return set() if self.record.state is None else self.record.state.held

    def close(self) -> None:
        """See Holder."""
        self.record = self.record.without_memory()

    def share(self) -> Record:
        """Its record, whose pages and slots others may hold from now on."""
        self.record = self.record.shared()
        return self.record

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """States of its past that it keeps, in order."""
        return [] if self.record.state is None else list(self.record.state.checkpoints)

    def drop(self, checkpoint: Checkpoint) -> None:
        """Keep this one no longer."""
        if self.record.state is not None:
            self.record = self.record._replace(state=self.record.state.without(checkpoint))

    @property
    def evaluated(self) -> int:
        """How many tokens the next step need not evaluate."""
        return self.record.evaluated
