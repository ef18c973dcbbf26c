"""Decoding where the device chooses tokens: a step is begun before it is known what it evaluates.

While a step runs, the one after it is prepared and given to the device, which puts the tokens in.
Of such a step ahead the records of its sequences know nothing but pages that they hold beside their
own; whoever uses the model in another way forgets it first, and it never was. Of several sequences
some may have ended with the step before: the others take their rows of the step ahead.
"""

from __future__ import annotations

import weakref
from collections import abc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from runtime.backends.base import Choice, Choosing, Program
from runtime.backends.environment import inspected
from runtime.engine.advance import Advance, Piece, begin, store
from runtime.engine.batch import Batch
from runtime.engine.sequence import Record, Sequence
from runtime.errors import Error, MemoryLimitError
from runtime.memory.holders import Holder

if TYPE_CHECKING:
    from runtime.engine.engine import Engine

_PAUSE = 8  # steps without one ahead, where others use the model in between


class Next(NamedTuple):
    """A token to evaluate after those of a sequence, and how the one that follows is chosen.

    then: how the one after that is going to be chosen, where it is likely to be wanted.
    """

    sequence: Sequence
    token: int
    choice: Choice
    then: Choice | None = None


class _Begun(NamedTuple):
    """A step of one token each that the device was given; `tokens` waits for what it chose.

    choices: of each advance. rows: which rows of the step are theirs. whole: all, in order.
    """

    advances: list[Advance]
    program: Program | None
    choices: list[Choice]
    tokens: Callable[[], np.ndarray]
    rows: list[int]
    whole: bool = True


class _Ahead(NamedTuple):
    """A step ahead of sequences with these records, whose next tokens are `tokens`."""

    step: _Begun
    sequences: list[weakref.ref[Sequence]]
    records: list[Record]
    tokens: list[int]


class Decoder:
    """Of one engine, whose backend chooses tokens."""

    def __init__(self, engine: Engine, backend: Choosing) -> None:
        self._engine, self._backend = engine, backend
        self._ahead: _Ahead | None = None
        self._pause = 0

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The engine's lock, and no step ahead."""
        with self._engine.lock:
            if self._ahead is not None:
                self._pause = _PAUSE
                self._forget()
            yield

    def choose(
        self, sequence: Sequence, token: int, choice: Choice, then: Choice | None = None
    ) -> int | None:
        """The same of one sequence; an error is raised."""
        found = self.choose_all([Next(sequence, token, choice, then)])
        if found is None:
            return None
        (chosen,) = found
        if isinstance(chosen, Error):
            try:
                raise chosen
            finally:
                del chosen, found  # or it and what it remembers of its way would hold one another
        return chosen

    def choose_all(self, wanted: abc.Sequence[Next]) -> list[int | Error] | None:
        """Evaluate a token of each sequence in one step and choose those that follow.

        None: as `Engine.run` does it, please. Where all say how they go on, the step after it is
        begun at once. Errors are those of `Engine.run`: of one sequence they leave that as it was,
        and the others go on; what breaks the step off leaves all as they were.
        """
        if inspected() or not wanted:
            return None if wanted else []
        with self._engine.going_on():
            step = self._taken(wanted) or self._begun(wanted)
            if step is None:
                return None
            kept = [n.sequence.record for n in wanted]
            try:
                return self._finished(wanted, step, kept)
            except BaseException:
                self._ahead = None
                store([n.sequence for n in wanted], list(map(_without_spare, kept)))
                raise

    def end(self) -> None:
        """No further token is wanted for now."""
        if self._ahead is not None and not self._engine.lock._is_owned():
            with self._engine.lock:
                self._forget()

    def _finished(
        self, wanted: abc.Sequence[Next], step: _Begun, kept: abc.Sequence[Record]
    ) -> list[int | Error]:
        """What was chosen, in the records too, once the step after it has been begun."""
        going = [a for a in step.advances if a.error is None]
        after = [a.done() for a in going]
        thens = [n.then for n in wanted if n.then is not None]
        ahead = None
        if self._pause:
            self._pause -= 1
        elif self._backend.ahead and step.whole and len(thens) == len(after) == len(wanted):
            ahead = self._begun_ahead(after, step, thens)
        tokens = iter(step.tokens()[step.rows].tolist())
        ends = iter(after)
        found: list[int | Error] = []
        records: list[Record] = []
        for before, advance in zip(kept, step.advances, strict=True):
            if advance.error is None:
                token, end = next(tokens), next(ends)
                found.append(token if token >= 0 else self._engine.not_finite())
                records.append(end if token >= 0 else _without_spare(before))
            else:
                found.append(advance.error)
                records.append(_without_spare(before))
                advance.error = None
        sequences = [n.sequence for n in wanted]
        good = [token for token in found if isinstance(token, int)]
        if ahead is not None and len(good) == len(found):
            pairs = zip(records, ahead.advances, strict=True)
            records = [record._replace(pages=advance.pages) for record, advance in pairs]
            self._ahead = _Ahead(ahead, list(map(weakref.ref, sequences)), records, good)
        store(sequences, records)
        for sequence in sequences:
            self._engine.keep(sequence)
        return found

    def _taken(self, wanted: abc.Sequence[Next]) -> _Begun | None:
        """The step ahead, or rows of it, if it is what is wanted; else there is none any more."""
        ahead = self._ahead
        if ahead is None:
            return None
        sequences = [ref() for ref in ahead.sequences]
        rows = []
        for n in wanted:
            at = sequences.index(n.sequence) if n.sequence in sequences else -1
            if (
                at < 0
                or at in rows
                or n.sequence.record is not ahead.records[at]
                or (ahead.tokens[at], ahead.step.choices[at]) != (n.token, n.choice)
            ):
                self._forget()
                return None
            rows.append(at)
        self._forget(rows)
        step, whole = ahead.step, rows == list(range(len(sequences)))
        for n, at in zip(wanted, rows, strict=True):
            step.advances[at].ids = [n.token]
        advances = [step.advances[at] for at in rows]
        choices = [step.choices[at] for at in rows]
        return step._replace(advances=advances, choices=choices, rows=rows, whole=whole)

    def _begun(self, wanted: abc.Sequence[Next]) -> _Begun | None:
        advances = self._engine.admitted([Piece(n.sequence, [n.token]) for n in wanted])
        if any(len(a.ids) > 1 for a in advances if a.error is None):  # after a rewind
            return None
        self._engine.check_size(advances)
        self._engine.pools.reserve(advances)
        pairs = [(a, n.choice) for a, n in zip(advances, wanted, strict=True) if a.error is None]
        going, choices = [a for a, _ in pairs], [choice for _, choice in pairs]
        if not going:
            return _Begun(advances, None, [], lambda: np.zeros(0, np.int32), [])
        begin(going)
        program, inputs, live = self._engine.prepared(Batch(going), going)
        tokens = self._backend.choose(program, inputs, live, choices)
        return _Begun(advances, program, choices, tokens, list(range(len(going))))

    def _begun_ahead(
        self, after: abc.Sequence[Record], step: _Begun, choices: list[Choice]
    ) -> _Begun | None:
        """The step behind `step`, which makes the records `after`; None where it cannot be now."""
        if any(record.length >= self._engine.context for record in after):
            return None
        advances = [Advance(Piece(Sequence(record, ""), [0])) for record in after]
        if not self._reserved(advances, step.advances):
            return None
        program, inputs, live = self._engine.prepared(Batch(advances), advances)
        if program is not step.program:
            return None
        known = {name: value for name, value in inputs.items() if name != "tokens"}
        tokens = self._backend.choose(program, known, live, choices)
        return _Begun(advances, program, choices, tokens, step.rows)

    def _reserved(self, advances: list[Advance], running: list[Advance]) -> bool:
        """Memory beside what the running step uses: neither of the two may need to be undone."""
        pools = self._engine.pools
        if not all(a.pages.writable(a.start, a.stop) for a in advances):
            taken = _Taken(running, pools.pages.holders())
            pools.holders.add(taken)
            wanted = [(a.pages, a.start, a.stop) for a in advances]
            for advance, found in zip(advances, pools.pages.prepare(wanted), strict=True):
                if isinstance(found, MemoryLimitError):
                    return False
                advance.pages = found
        if pools.slots.count:
            used = set[int]().union(*(holder.held_slots() for holder in pools.holders))
            used |= set[int]().union(*(a.held_slots() for a in (*running, *advances)))
            for advance in advances:
                slot = pools.slots.take(used)
                if slot is None:
                    return False
                advance.slot_out = slot
                used.add(slot)
        return True

    def _forget(self, kept: abc.Sequence[int] = ()) -> None:
        """There is no step ahead; the sequences, but those, without what they hold for it."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return
        for at, (ref, record) in enumerate(zip(ahead.sequences, ahead.records, strict=True)):
            sequence = None if at in kept else ref()
            if sequence is not None and sequence.record is record:
                sequence.record = _without_spare(record)


class _Taken(Holder):
    """What a running step took and no record holds yet."""

    __slots__ = ("_pages",)

    def __init__(self, advances: abc.Sequence[Advance], held: np.ndarray) -> None:
        """held: how many hold each page."""
        pages = np.unique(np.concatenate([a.pages.held for a in advances]))
        self._pages = pages[held[pages] == 0]

    def held_pages(self) -> np.ndarray:
        """See Holder."""
        return self._pages

    def held_slots(self) -> set[int]:
        """See Holder; slots are looked at one by one."""
        return set()


def _without_spare(record: Record) -> Record:
    """Without pages for tokens that it does not have."""
    return record._replace(pages=record.pages.cut(record.length))
