"""Decoding where the device chooses tokens: a step is begun before the token it evaluates is known.

While a step runs, the one after it is prepared and given to the device, which puts the token in. Of
such a step ahead the record of its sequence knows nothing but pages that it holds beside its own;
whoever uses the model in another way forgets it first, and it never was.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from runtime.backends.base import Choice, Choosing, Program
from runtime.backends.environment import inspected
from runtime.engine.advance import Advance, Piece, begin
from runtime.engine.batch import Batch
from runtime.engine.sequence import Record, Sequence
from runtime.errors import MemoryLimitError

if TYPE_CHECKING:
    from runtime.engine.engine import Engine

_PAUSE = 8  # tokens without a step ahead, where others use the model in between


class _Begun(NamedTuple):
    """A step of one token that the device has been given; `tokens` waits for what it chose."""

    advance: Advance
    program: Program
    choice: Choice
    tokens: Callable[[], np.ndarray]


class _Ahead(NamedTuple):
    """A step ahead of a sequence whose record is `record` and whose next token is `token`."""

    step: _Begun
    sequence: weakref.ref[Sequence]
    record: Record
    token: int


class Decoder:
    """Of one engine, whose backend is `Choosing`."""

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
        """Evaluate `token` and choose the one that follows; None: as `Engine.run` does it, please.

        then: how the one after that is going to be chosen, where it is likely to be wanted; that
        step is begun at once. Errors are those of `Engine.run`, and leave the sequence as it was.
        """
        if inspected():
            return None
        with self._engine.going_on():
            step = self._taken(sequence, token, choice) or self._begun(sequence, token, choice)
            if step is None:
                return None
            kept = sequence.record
            try:
                return self._finished(sequence, step, then)
            except BaseException:
                self._ahead, sequence.record = None, _without_spare(kept)
                raise

    def end(self) -> None:
        """No further token is wanted for now."""
        if self._ahead is not None and not self._engine.lock._is_owned():
            with self._engine.lock:
                self._forget()

    def _finished(self, sequence: Sequence, step: _Begun, then: Choice | None) -> int:
        after = step.advance.done()
        ahead = None
        if self._pause:
            self._pause -= 1
        elif then is not None and after.length < self._engine.context:
            ahead = self._begun_ahead(after, step, then)
        (token,) = step.tokens().tolist()
        if token < 0:
            raise self._engine.not_finite()
        if ahead is not None:
            after = after._replace(pages=ahead.advance.pages)
            self._ahead = _Ahead(ahead, weakref.ref(sequence), after, token)
        sequence.record = after
        return token

    def _taken(self, sequence: Sequence, token: int, choice: Choice) -> _Begun | None:
        """The step ahead, if it is this one; else there is none any more."""
        ahead = self._ahead
        same = ahead is not None and ahead.sequence() is sequence
        if ahead is None or not same or sequence.record is not ahead.record:
            self._forget()
            return None
        if (ahead.token, ahead.step.choice) != (token, choice):
            self._forget()
            return None
        self._ahead, ahead.step.advance.ids = None, [token]
        return ahead.step

    def _begun(self, sequence: Sequence, token: int, choice: Choice) -> _Begun | None:
        piece = Piece(sequence, [token])
        self._engine.check_open()
        self._engine.check(piece)
        advance = Advance(piece)
        if len(advance.ids) > 1:  # after a rewind
            return None
        self._engine.pools.reserve([advance])
        if advance.error is not None:
            raise advance.error
        begin([advance])
        program, inputs, live = self._engine.prepared(Batch([advance]), [advance])
        tokens = self._backend.choose(program, inputs, live, [choice])
        return _Begun(advance, program, choice, tokens)

    def _begun_ahead(self, after: Record, step: _Begun, choice: Choice) -> _Begun | None:
        """The step behind `step`, which makes the record `after`; None where it cannot be now."""
        advance = Advance(Piece(Sequence(after, ""), [0]))
        if not self._reserved(advance, step.advance):
            return None
        program, inputs, live = self._engine.prepared(Batch([advance]), [advance])
        if program is not step.program:
            return None
        known = {name: value for name, value in inputs.items() if name != "tokens"}
        tokens = self._backend.choose(program, known, live, [choice])
        return _Begun(advance, program, choice, tokens)

    def _reserved(self, advance: Advance, running: Advance) -> bool:
        """Memory beside what the running step uses: neither of the two may need to be undone.

        Two tokens in a row do not both begin a page.
        """
        pools = self._engine.pools
        if not advance.pages.writable(advance.start, advance.stop):
            (found,) = pools.pages.prepare([(advance.pages, advance.start, advance.stop)])
            if isinstance(found, MemoryLimitError):
                return False
            advance.pages = found
        if pools.slots.count:
            used = set[int]().union(*(holder.held_slots() for holder in pools.holders))
            slot = pools.slots.take(used | running.held_slots() | advance.held_slots())
            if slot is None:
                return False
            advance.slot_out = slot
        return True

    def _forget(self) -> None:
        """The sequence without what it holds for the step ahead."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return
        sequence = ahead.sequence()
        if sequence is not None and sequence.record is ahead.record:
            sequence.record = _without_spare(ahead.record)


def _without_spare(record: Record) -> Record:
    """Without pages for tokens that it does not have."""
    return record._replace(pages=record.pages.cut(record.length))
