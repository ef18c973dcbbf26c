"""Drafts of the block that predicts further tokens: from the last hidden row of each sequence."""

from __future__ import annotations

import time
from collections import abc
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from runtime.backends.base import Progress
from runtime.engine.graphs import bucket
from runtime.engine.programs import Programs
from runtime.engine.sequence import Sequence
from runtime.errors import MemoryLimitError
from runtime.memory.pages import Pages

if TYPE_CHECKING:
    from runtime.engine.engine import Engine

MOST = 7  # tokens of a sequence that are drafted
_LONG = 400e-6  # seconds after which it is looked whether to go on
_NEW = 0.2  # how much one run changes of what is known of them


class _Going(NamedTuple):
    """A sequence of `length` tokens with these pages; the token behind them, the row before it."""

    length: int
    pages: Pages
    token: int
    row: np.ndarray


class NextNDrafts:
    """Of one engine, whose model has a predictor."""

    def __init__(self, engine: Engine, progress: bool | Progress | None) -> None:
        self._engine = engine
        self._each = 0.0  # seconds of a draft; 0: not known
        self.programs = Programs(
            engine.backend, engine.graphs.drafts, lambda n, each: (bucket(n), each),
            progress=progress,
        )  # fmt: skip

    def make_ready(self) -> None:
        """Make the programs of one sequence, so that no draft waits for one."""
        with self._engine.alone():
            self._engine.check_open()
            for count in range(1, MOST + 1):
                self.programs.of(1, count)

    def of(
        self, wanted: abc.Sequence[tuple[Sequence, int]], most: int, least: float = 0.0
    ) -> list[list[int]]:
        """Of each sequence up to `most` tokens likely to follow the token given, which is next.

        Up to the first that the block itself finds less likely than `least`. None where the last
        hidden row is not known, or where there is no room for them. Sequences stay as they are,
        but for pages of their own in place of some that others hold as well.
        """
        engine, found = self._engine, [list[int]() for _ in wanted]
        most = min(most, MOST)
        with engine.alone():
            engine.check_open()
            going = self._ready(wanted, most)
            while going and most > 0:
                count = self._count(most)
                tokens, shares, rows = self._run(list(going.values()), count)
                most -= count
                unsure = np.append(shares < least, np.ones((len(shares), 1), bool), 1)
                for (n, one), own, kept, row in zip(
                    list(going.items()), tokens, unsure.argmax(1).tolist(), rows, strict=True
                ):
                    found[n] += own[:kept]
                    going[n] = one._replace(length=one.length + count, token=own[-1], row=row)
                    if kept < count:
                        del going[n]
        return found

    def _count(self, most: int) -> int:
        """How many to draft before it is looked whether to go on."""
        return most if not self._each else max(1, min(most, int(_LONG / self._each)))

    def _ready(self, wanted: abc.Sequence[tuple[Sequence, int]], most: int) -> dict[int, _Going]:
        """By number those of which something can be drafted."""
        engine, found = self._engine, dict[int, _Going]()
        for n, (sequence, token) in enumerate(wanted):
            record = sequence.record
            row = None if record.closed else record.last_row
            if row is not None and record.length + most <= engine.context:
                found[n] = _Going(record.length, record.pages, token, row)
        if all(one.pages.writable(one.length, one.length + most) for one in found.values()):
            return found
        ends = [(one.pages, one.length, one.length + most) for one in found.values()]
        for n, pages in zip(list(found), engine.pools.pages.prepare(ends), strict=True):
            if isinstance(pages, MemoryLimitError):
                del found[n]
            else:
                _take_over(wanted[n][0], pages)
                found[n] = found[n]._replace(pages=pages)
        return found

    def _run(
        self, going: abc.Sequence[_Going], count: int
    ) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
        """Of each `count` tokens, how likely each is, and the row behind them."""
        program, size = self.programs.of(len(going), count), len(going)
        components = self._engine.architecture.positions_per_token
        lengths = np.array([one.length for one in going], np.int32)
        inputs = {
            "tokens": np.array([one.token for one in going], np.int32),
            "vectors": np.stack([one.row for one in going]),
            "sequences": np.arange(size, dtype=np.int32), "block_table": _table(going),
        }  # fmt: skip
        slots = [one.pages.kv_slots(one.length, one.length + count) for one in going]
        for ahead, kv_slots in enumerate(np.stack(slots, 1)):
            mark, places = f".{ahead}" if ahead else "", lengths + np.int32(ahead)
            inputs[f"places{mark}"], inputs[f"kv_slots{mark}"] = places, kv_slots
            inputs[f"positions{mark}"] = (
                places if components == 1 else places.repeat(components).reshape(size, -1)
            )
        begun = time.perf_counter()
        results = program.run(inputs, {"tokens": size, "outputs": size, "sequences": size})
        each = (time.perf_counter() - begun) / count
        self._each += (_NEW if self._each else 1.0) * (each - self._each)
        tokens, shares = (np.concatenate(results[i : i + count], 1) for i in (0, count))
        return tokens.tolist(), shares, results[-1].copy()


def _table(going: abc.Sequence[_Going]) -> np.ndarray:
    """The pages of each."""
    if len(going) == 1:
        return going[0].pages.held[None]
    found = np.zeros((len(going), max(one.pages.used for one in going)), np.int32)
    for row, one in zip(found, going, strict=True):
        row[: one.pages.used] = one.pages.held
    return found


def _take_over(sequence: Sequence, pages: Pages) -> None:
    """Nobody else's pages from where it is going to write, as when a step begins."""
    record = sequence.record
    if pages.row is not record.pages.row:
        sequence.record = record._replace(pages=pages.cut(record.length))
