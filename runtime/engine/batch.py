"""Ragged batches: pieces of several sequences as the inputs of one step after another."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.engine.advance import Advance

UBATCH = 512  # tokens of the largest step
_ROW_MACS = 64 << 30  # of one row of a plan, so that who presses Ctrl-C need not wait for its end
_TAIL = 32  # tokens after the last state kept within a long prompt


@dataclass(slots=True)
class Part:
    """What one step evaluates of an advance: places start..start+len(ids)-1.

    After a rewind the first ones may be tokens that the sequence has already.
    """

    advance: Advance
    ids: list[int]
    start: int
    wanted: Sequence[int]  # offsets in `ids` whose logits are asked for
    message_end: bool  # a message ends with it, or near it

    @staticmethod
    def of(advance: Advance, at: int, stop: int, message_end: bool = False) -> Part:
        """Tokens at..stop-1 of those to evaluate."""
        ids, wanted = advance.ids, advance.wanted
        if stop == len(ids):
            message_end = message_end or advance.closes
            if not at:
                return Part(advance, ids, advance.start, wanted, message_end)
        first, last = bisect_left(wanted, at), bisect_left(wanted, stop)
        found = [place - at for place in wanted[first:last]]
        return Part(advance, ids[at:stop], advance.start + at, found, message_end)

    def vectors(self) -> np.ndarray | None:
        """float32 [tokens without an id, hidden], where there are any."""
        given = self.advance.vectors
        if given is None:
            return None
        at = self.start - self.advance.start
        first = sum(i < 0 for i in self.advance.ids[:at])
        return given[first : first + sum(i < 0 for i in self.ids)]

    def positions(self) -> np.ndarray | None:
        """int32 [tokens] or [tokens, components] where they are not the places."""
        given, at = self.advance.positions, self.start - self.advance.before.length
        if given is None or at + len(self.ids) <= 0:
            return None
        again = np.arange(self.start, self.start + max(0, -at), dtype=np.int32)
        again = again.reshape(-1, *[1] * (given.ndim - 1))
        own = given[max(0, at) : at + len(self.ids)]
        return np.concatenate([np.broadcast_to(again, (len(again), *own.shape[1:])), own])

    def finish(self) -> None:
        """The step has ended."""
        self.advance.end(self.start + len(self.ids), self.message_end)


class Batch:
    """One step: its parts, whose rows of logits come behind one another."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.tokens = self.outputs = 0
        self.vectors = self.positioned = False  # whether tokens come with vectors, with positions

    def add(self, part: Part) -> None:
        """One part more, of a sequence that has none here."""
        self.parts.append(part)
        self.tokens += len(part.ids)
        self.outputs += len(part.wanted)
        self.vectors = self.vectors or part.advance.vectors is not None
        self.positioned = self.positioned or part.advance.positions is not None

    def rows(self, logits: np.ndarray) -> Iterator[tuple[Advance, np.ndarray]]:
        """Whose rows are which of the step's logits."""
        at = 0
        for part in self.parts:
            yield part.advance, logits[at : at + len(part.wanted)]
            at += len(part.wanted)

    @property
    def live(self) -> dict[str, int]:
        """How much of each capacity this step fills."""
        return {"tokens": self.tokens, "outputs": self.outputs, "sequences": len(self.parts)}

    def inputs(self, components: int = 1) -> dict[str, np.ndarray]:
        """Step inputs, live parts only, of sequences whose memory is prepared.

        components: numbers of a position.
        """
        single = self.tokens == len(self.parts)
        found = self._single_tokens() if single else self._any_tokens()
        found["table"] = self._table()
        found["positions"] = self._positions(found["places"], components)
        if self.vectors:
            found |= self._vectors(found["tokens"])
        if self.parts[0].advance.state is not None:
            slots = [p.advance.slots for p in self.parts]
            found["slot_in"], found["slot_out"] = np.array(slots, np.int32).T
            found["runs"] = self._runs()
        return found

    def _positions(self, places: np.ndarray, components: int) -> np.ndarray:
        positions = places
        if components > 1:  # of a text they are all the same
            positions = places.repeat(components).reshape(-1, components)
        if self.positioned:
            positions, at = positions.copy(), 0
            for part in self.parts:
                if (own := part.positions()) is not None:
                    positions[at : at + len(own)] = own
                at += len(part.ids)
        return positions

    def _vectors(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        given = [v for part in self.parts if (v := part.vectors()) is not None]
        vectors = np.zeros((self.tokens, given[0].shape[1]), np.float32)
        vectors[tokens < 0] = np.concatenate(given)
        from_table = (tokens >= 0).astype(np.float32)[:, None]
        return {"vectors": vectors, "from_table": from_table, "tokens": tokens.clip(0)}

    def _single_tokens(self) -> dict[str, np.ndarray]:
        """One token each: a decode step, where every microsecond counts."""
        parts = self.parts
        rows = [
            [p.ids[0] for p in parts], [p.start for p in parts],
            [p.advance.pages.slot(p.start) for p in parts], range(len(parts)),
        ]  # fmt: skip
        tokens, places, slots, sequences = np.array(rows, np.int32)
        wanted = [row for row, p in enumerate(parts) if p.wanted]
        return {
            "tokens": tokens, "places": places, "slots": slots, "sequences": sequences,
            "output_rows": np.array(wanted, np.int32),
        }  # fmt: skip

    def _any_tokens(self) -> dict[str, np.ndarray]:
        columns: dict[str, list[np.ndarray]] = {
            n: [] for n in ("tokens", "places", "slots", "sequences", "output_rows")
        }
        at = 0
        for row, p in enumerate(self.parts):
            n = len(p.ids)
            columns["tokens"].append(np.array(p.ids, np.int32))
            columns["places"].append(np.arange(p.start, p.start + n, dtype=np.int32))
            columns["slots"].append(p.advance.pages.slots(p.start, p.start + n))
            columns["sequences"].append(np.full(n, row, np.int32))
            columns["output_rows"].append(np.array(p.wanted, np.int32) + np.int32(at))
            at += n
        return {n: np.concatenate(parts) for n, parts in columns.items()}

    def _table(self) -> np.ndarray:
        rows = [p.advance.pages.held for p in self.parts]
        if len(rows) == 1:
            return rows[0][None]
        table = np.zeros((len(rows), max(map(len, rows))), np.int32)
        for row, pages in zip(table, rows, strict=True):
            row[: len(pages)] = pages
        return table

    def _runs(self) -> np.ndarray:
        rows, at = [], 0
        for p in self.parts:
            rows.append((at, len(p.ids)))
            at += len(p.ids)
        return np.array(rows, np.int32)


def largest_step(shapes: Iterable[tuple[int, ...]], experts: int = 1) -> int:
    """Tokens of the largest step of a model whose layers have matrices of these shapes.

    UBATCH; fewer for large models, as the step under way cannot be left before the end of a row
    of its plan, which multiplies two matrices at most. experts: how many a token uses.
    """
    each = [math.prod(s[-2:]) * (experts if len(s) > 2 else 1) for s in shapes if len(s) > 1]
    return bucket_below(_ROW_MACS // (2 * max([1, *each])))


def bucket_below(n: int) -> int:
    """The largest power of two up to n: at least 1, at most UBATCH."""
    return min(UBATCH, 1 << (max(1, n).bit_length() - 1))


def cut(advances: Sequence[Advance], most_tokens: int, most_rows: int) -> Iterator[Batch]:
    """Steps of at most `most_tokens` tokens and `most_rows` rows of logits, in order.

    A part also ends where a state is to be kept.
    """
    batch = Batch()
    for advance in advances:
        keep_at = _state_kept_at(advance, most_tokens)
        at = 0
        while at < len(advance.ids):
            stop = _stop(advance, at, most_tokens - batch.tokens, most_rows - batch.outputs)
            if stop <= at:
                yield batch
                batch = Batch()
                continue
            if at < keep_at < stop:
                stop = keep_at
            batch.add(Part.of(advance, at, stop, stop == keep_at))
            at = stop
            if at < len(advance.ids):  # a sequence has one part in a step
                yield batch
                batch = Batch()
    if batch.parts:
        yield batch


def _stop(advance: Advance, at: int, tokens: int, rows: int) -> int:
    """How far a part from `at` on may go where there is room for so many tokens and rows."""
    stop = min(at + tokens, len(advance.ids))
    wanted = advance.wanted
    first = bisect_left(wanted, at)
    return stop if len(wanted) - first <= rows else min(stop, wanted[first + rows])


def _state_kept_at(advance: Advance, most_tokens: int) -> int:
    """Where in its tokens a piece has to end so that its state can be kept; 0: nowhere.

    The next message of a chat often differs from the last tokens of this one (an empty thought
    that the template drops), and would find no state near them. Prompts of one step are not cut:
    that costs them more than it saves.
    """
    n = len(advance.ids)
    return n - _TAIL if advance.state is not None and n > most_tokens else 0
