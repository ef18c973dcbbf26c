"""A round: everybody who is in it goes on by a token, or by a piece of a prompt, in one step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from runtime.engine.advance import Piece
from runtime.engine.engine import Engine
from runtime.engine.pace import Pace
from runtime.engine.task import Task
from runtime.errors import Error, MemoryLimitError
from runtime.ops import PAGE

Watch = Callable[[float, float, list[tuple[Task, int, bool]]], Any]  # of parts: tokens, prompt
Short = list[tuple[Task, MemoryLimitError]]  # who found no memory, and what says so


class _Part(NamedTuple):
    """What a step takes of a task, and whether that is all that was pending."""

    task: Task
    piece: Piece
    last: bool = True


class Rounds:
    """Rounds of one engine; who is in them decides `Scheduler`."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.pace = engine, Pace()
        self._turn = 0  # counts who comes first
        self.watched: Watch | None = None  # is told of each step

    def whole(self, task: Task) -> None:
        """The prompt of somebody who is alone: all of it at once, or nothing."""
        assert task.sequence is not None, "who is in a round has memory"
        piece = Piece(task.sequence, task.pending)
        try:
            if task.sequence.record.length != task.length:
                raise task.moved()
            (rows,) = self._engine.run_all([piece], task.on_prompt)
        except Exception as error:
            task.fail(error)
        else:
            task.read = task.said = task.total
            _given(task, rows[-1], [])

    def run(self, tasks: Sequence[Task]) -> Short:
        """One for all of these, in the order in which they get memory; who did not get any."""
        singles, prompts, short = [], [], Short()
        for task in tasks:
            assert task.sequence is not None, "who is in a round has memory"
            record = task.sequence.record
            if record.length != task.length:
                task.fail(task.moved())
            elif task.read == task.total:
                singles.append(task)
            else:
                if record.state is not None and record.state.place < record.length:
                    self._settle(task)
                prompts.append(task)
        try:
            singles = self._chosen(self._drafted(singles, short), short)
            if singles or prompts:
                self._step(singles, prompts, short)
        except Exception as error:  # of the step as a whole
            for task in tasks:
                if not task.over:
                    task.fail(error)
        return short

    def _settle(self, task: Task) -> None:
        """What would be evaluated again, as a recurrent state lies before it, comes first."""
        sequence = task.sequence
        assert sequence is not None, "who is in a round has memory"
        with self._engine.alone():
            record = sequence.record
            if record.given <= record.evaluated < record.length:
                again = record.tokens[record.evaluated : record.length]
                sequence.record = record.cut(record.evaluated)
                task.pending, task.length = again + task.pending, record.evaluated
                task.read, task.total = 0, len(task.pending)

    def _drafted(self, singles: list[Task], short: Short) -> list[Task]:
        """Those whose next logits are not known already."""
        rest = []
        for task in singles:
            row = task.known()
            if row is None:
                rest.append(task)
            else:
                _given(task, row, short)
        return rest

    def _chosen(self, singles: list[Task], short: Short) -> list[Task]:
        """A device chooses the next tokens of all of these that it can; the others."""
        decoder = self._engine.decoder
        if decoder is None or not singles:
            return singles
        nexts = [task.next() for task in singles]
        able = [(t, n) for t, n in zip(singles, nexts, strict=True) if n is not None]
        found = decoder.choose_all([n for _, n in able])
        if found is None:
            return singles
        for (task, _), token in zip(able, found, strict=True):
            _given(task, token, short)
        return [t for t, n in zip(singles, nexts, strict=True) if n is None]

    def _step(self, singles: Sequence[Task], prompts: Sequence[Task], short: Short) -> None:
        parts = self._singles(singles)
        single = sum(len(part.piece.ids) for part in parts)
        parts += self._prompts(prompts, single)
        again = self._run(parts, single, short)
        if again:
            self._run([_Part(task, task.piece(len(again), True)) for task in again], 0, short)

    def _run(self, parts: Sequence[_Part], single: int, short: Short) -> list[Task]:
        """A step; those that have to be evaluated without their drafts."""
        again, began = [], time.perf_counter()
        with self._engine.ran([part.piece for part in parts]) as found:
            seconds = time.perf_counter() - began
            if self.watched is not None:
                told = [(t, len(piece.ids), t.read < t.total) for t, piece, _ in parts]
                self.watched(began, seconds, told)
            for (task, piece, last), rows in zip(parts, found, strict=True):
                if isinstance(rows, Error):
                    row: np.ndarray | Error | None = task.row(piece, rows)
                else:
                    if task.read < task.total:
                        task.read += len(piece.ids)
                    if not last:
                        task.pending = task.pending[len(piece.ids) :]
                        task.length += len(piece.ids)
                        continue
                    row = task.row(piece, rows)
                if row is None:
                    again.append(task)
                else:
                    _given(task, row, short)
        if single:
            tokens = sum(len(part.piece.ids) for part in parts)
            self.pace.learn(single, tokens - single, seconds)
        return again

    def _singles(self, tasks: Sequence[Task]) -> list[_Part]:
        """As many as one step takes, in turn."""
        most = min(self._engine.most_tokens, self._engine.most_rows)
        if len(tasks) > most:
            at = self._turn % len(tasks)
            self._turn += most
            tasks = [*tasks[at:], *tasks[:at]][:most]
        return [_Part(task, task.piece(len(tasks), False)) for task in tasks]

    def _prompts(self, tasks: Sequence[Task], single: int) -> list[_Part]:
        """What is left of a step of so many single tokens, for whose turn it is; every other time
        that is the first."""
        room, rows = self._engine.most_tokens - single, self._engine.most_rows - single
        if not tasks:
            return []
        if single:
            room = min(room, self.pace.share(self._engine.most_tokens))
        self._turn += 1
        at = self._turn // 2 % len(tasks) if self._turn % 2 else 0
        parts = list[_Part]()
        for task in (*tasks[at:], *tasks[:at]):
            if room <= 0 or len(parts) >= rows:
                break
            parts.append(self._prompt(task, room))
            room -= len(parts[-1].piece.ids)
        return parts

    def _prompt(self, task: Task, room: int) -> _Part:
        """The next piece of a prompt, of at most so many tokens.

        Of models with recurrent layers a state is kept a page before the end of one of several
        pieces, as the next message often differs from its last tokens.
        """
        sequence, left, first = task.sequence, len(task.pending), task.read == 0
        assert sequence is not None, "who is in a round has memory"
        n = min(room, left)
        keeps = sequence.record.state is not None and not (first and n == left)
        if keeps and left - n < PAGE < left:
            n = left - PAGE
        last, several = n == left, task.total > 1
        closes = several and (last or (keeps and left - n == PAGE))
        ids, rows = (task.pending, "last") if last else (task.pending[:n], "none")
        return _Part(task, Piece(sequence, ids, rows, several and first, closes), last)


def _given(task: Task, found: np.ndarray | int | Error, short: Short) -> None:
    if isinstance(found, MemoryLimitError):
        short.append((task, found))
    elif isinstance(found, Error):
        task.fail(found)
    else:
        task.length += len(task.pending)
        try:
            task.take(found)
        except Exception as error:  # such as a bias that forbids every token
            task.fail(error)
