"""Drafts of the block that predicts further tokens: from the last hidden row of each sequence."""

from __future__ import annotations

from collections import abc
from typing import TYPE_CHECKING

import numpy as np

from runtime.backends.base import Progress
from runtime.engine.graphs import bucket
from runtime.engine.programs import Programs
from runtime.engine.sequence import Record, Sequence
from runtime.errors import MemoryLimitError
from runtime.memory.pages import Pages

if TYPE_CHECKING:
    from runtime.engine.engine import Engine

MOST = 4  # tokens that are drafted in one go


class NextNDrafts:
    """Of one engine, whose model has a predictor."""

    def __init__(self, engine: Engine, progress: bool | Progress | None) -> None:
        self._engine = engine
        self.programs = Programs(
            engine.backend, engine.graphs.drafts, lambda n, each: (bucket(n), each),
            progress=progress,
        )  # fmt: skip

    def of(self, wanted: abc.Sequence[tuple[Sequence, int]], most: int) -> list[list[int]]:
        """Of each sequence up to `most` tokens likely to follow the token given, which is next.

        None where its last hidden row is not known, or where there is no room for them. Sequences
        stay as they are, but for pages of their own in place of some that others hold as well.
        """
        engine, count = self._engine, min(most, MOST)
        with engine.alone():
            engine.check_open()
            records = [sequence.record for sequence, _ in wanted]
            going = [n for n, record in enumerate(records) if self._ready(record, count)]
            found: list[list[int]] = [[] for _ in wanted]
            if not going or count < 1:
                return found
            pages = engine.pools.pages.prepare(
                [(records[n].pages, records[n].length, records[n].length + count) for n in going]
            )
            given = []
            for n, own in zip(going, pages, strict=True):
                if not isinstance(own, MemoryLimitError):
                    _take_over(wanted[n][0], own)
                    given.append((n, own))
            if given:
                rows = [(records[n], own, wanted[n][1]) for n, own in given]
                for (n, _), tokens in zip(given, self._run(rows, count), strict=True):
                    found[n] = tokens
        return found

    def _ready(self, record: Record, count: int) -> bool:
        room = self._engine.context - record.length
        return not record.closed and record.last_row is not None and count <= room

    def _run(self, rows: abc.Sequence[tuple[Record, Pages, int]], count: int) -> list[list[int]]:
        """Of sequences with these pages the tokens drafted behind the one given."""
        program = self.programs.of(len(rows), count)
        most = max(pages.used for _, pages, _ in rows)
        table = np.zeros((len(rows), most), np.int32)
        for row, (_, pages, _) in zip(table, rows, strict=True):
            row[: pages.used] = pages.held
        inputs = {
            "tokens": np.array([token for _, _, token in rows], np.int32),
            "vectors": np.stack([x for r, *_ in rows if (x := r.last_row) is not None]),
            "sequences": np.arange(len(rows), dtype=np.int32), "block_table": table,
        }  # fmt: skip
        components = self._engine.architecture.positions_per_token
        for ahead in range(count):
            places = np.array([record.length + ahead for record, _, _ in rows], np.int32)
            slots = [pages.kv_slot(record.length + ahead) for record, pages, _ in rows]
            mark = f".{ahead}" if ahead else ""
            inputs[f"places{mark}"], inputs[f"kv_slots{mark}"] = places, np.array(slots, np.int32)
            inputs[f"positions{mark}"] = places if components == 1 else _columns(places, components)
        live = {"tokens": len(rows), "outputs": len(rows), "sequences": len(rows)}
        found = program.run(inputs, live)
        return np.stack([tokens.reshape(-1) for tokens in found], 1).tolist()


def _columns(places: np.ndarray, components: int) -> np.ndarray:
    return places.repeat(components).reshape(-1, components)


def _take_over(sequence: Sequence, pages: Pages) -> None:
    """Nobody else's pages from where it is going to write, as when a step begins."""
    record = sequence.record
    if pages.row is not record.pages.row:
        sequence.record = record._replace(pages=pages.cut(record.length))
