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
_STAGED, _STEPS = 32, 12  # least tokens of a step for several stages; steps for each of them
_TAIL = 32  # tokens after the last state kept within a prompt
_CUT = 64  # tokens of the longest prompt that is not cut for it


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
    def of(advance: Advance, at: int, stop: int, message_end: bool) -> Part:
        """Tokens at..stop-1 of those to evaluate."""
        wanted = advance.wanted
        first, last = bisect_left(wanted, at), bisect_left(wanted, stop)
        found = [place - at for place in wanted[first:last]]
        end = message_end or (advance.closes and stop == len(advance.ids))
        return Part(advance, advance.ids[at:stop], advance.start + at, found, end)

    def finish(self) -> None:
        """The step has ended."""
        self.advance.end(self.start + len(self.ids), self.message_end)


class Batch:
    """One step: its parts, whose rows of logits come behind one another.

    `last`: it is known that no other step is needed.
    """

    def __init__(self, advances: Iterable[Advance] = (), last: bool = False) -> None:
        """advances: those that it takes to their ends."""
        self.last = last
        self.parts: list[Part] = []
        self.tokens = self.outputs = 0
        self.given = set[str]()  # what some tokens come with
        for a in advances:
            self.add(Part(a, a.ids, a.start, a.wanted, a.closes))

    def add(self, part: Part) -> None:
        """One part more, of a sequence that has none here."""
        self.parts.append(part)
        self.tokens += len(part.ids)
        self.outputs += len(part.wanted)
        if part.advance.given:
            self.given |= part.advance.given.keys()

    @property
    def live(self) -> dict[str, int]:
        """How much of each capacity this step fills."""
        return {"tokens": self.tokens, "outputs": self.outputs, "sequences": len(self.parts)}

    def inputs(self, components: int, hidden: int) -> dict[str, np.ndarray]:
        """Step inputs, live parts only, of sequences whose memory is prepared.

        components: numbers of a position. hidden: of a vector.
        """
        single = self.tokens == len(self.parts)
        found = self._single_tokens() if single else self._any_tokens()
        found["block_table"] = self._block_table()
        places = found["places"]
        found["positions"] = places
        if components > 1:  # of a text they are all the same
            found["positions"] = places.repeat(components).reshape(-1, components)
        if self.given:
            self._add_given(found, hidden)
        if self.parts[0].advance.state is not None:
            slots = [p.advance.slots for p in self.parts]
            found["slot_in"], found["slot_out"] = np.array(slots, np.int32).T
            found["spans"] = self._spans()
        return found

    def _add_given(self, found: dict[str, np.ndarray], hidden: int) -> None:
        """Put what tokens come with in place of what they have by default."""
        if "positions" in self.given:
            found["positions"] = self._column("positions", found["positions"].copy())
        if "vectors" in self.given:
            absent = found["tokens"] < 0
            vectors = self._column("vectors", np.zeros((self.tokens, hidden), np.float32))
            found["vectors"] = np.where(absent[:, None], vectors, np.float32(0))
            found["from_table"] = (~absent)[:, None].astype(np.float32)
            found["tokens"] = found["tokens"].clip(0)

    def _column(self, name: str, rows: np.ndarray) -> np.ndarray:
        """`rows`, one for each token, with those that tokens come with under a name."""
        at = 0
        for part in self.parts:
            n, given = len(part.ids), part.advance.given.get(name)
            first = part.start - part.advance.before.length  # below 0: evaluated again
            if given is not None and first + n > 0:
                rows[at + max(0, -first) : at + n] = given[max(0, first) : first + n]
            at += n
        return rows

    def _single_tokens(self) -> dict[str, np.ndarray]:
        """One token each: a decode step, where every microsecond counts."""
        parts = self.parts
        rows = [
            [p.ids[0] for p in parts], [p.start for p in parts],
            [p.advance.pages.kv_slot(p.start) for p in parts], range(len(parts)),
        ]  # fmt: skip
        tokens, places, kv_slots, sequences = np.array(rows, np.int32)
        wanted = [row for row, p in enumerate(parts) if p.wanted]
        return {
            "tokens": tokens, "places": places, "kv_slots": kv_slots, "sequences": sequences,
            "output_rows": np.array(wanted, np.int32),
        }  # fmt: skip

    def _any_tokens(self) -> dict[str, np.ndarray]:
        columns: dict[str, list[np.ndarray]] = {
            n: [] for n in ("tokens", "places", "kv_slots", "sequences", "output_rows")
        }
        at = 0
        for row, p in enumerate(self.parts):
            n = len(p.ids)
            columns["tokens"].append(np.array(p.ids, np.int32))
            columns["places"].append(np.arange(p.start, p.start + n, dtype=np.int32))
            columns["kv_slots"].append(p.advance.pages.kv_slots(p.start, p.start + n))
            columns["sequences"].append(np.full(n, row, np.int32))
            columns["output_rows"].append(np.array(p.wanted, np.int32) + np.int32(at))
            at += n
        return {n: np.concatenate(parts) for n, parts in columns.items()}

    def _block_table(self) -> np.ndarray:
        rows = [p.advance.pages.held for p in self.parts]
        if len(rows) == 1:
            return rows[0][None]
        table = np.zeros((len(rows), max(map(len, rows))), np.int32)
        for row, pages in zip(table, rows, strict=True):
            row[: len(pages)] = pages
        return table

    def _spans(self) -> np.ndarray:
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


def size_of(advances: Iterable[Advance]) -> tuple[int, int]:
    """Tokens to evaluate, and rows of logits that are wanted."""
    tokens = rows = 0
    for advance in advances:
        tokens += len(advance.ids)
        rows += len(advance.wanted)
    return tokens, rows


def staged_step(tokens: int, stages: int, most: int) -> int:
    """Tokens of a step where `stages` can each do another one: steps enough to keep all at work.

    More would be smaller, and slower; fewer leave stages waiting at the beginning and at the end.
    """
    each = min(most, bucket_below(max(_STAGED, tokens // (_STEPS * stages))))
    return -(-tokens // -(-tokens // each))  # all of about one size


def cut(advances: Sequence[Advance], most_tokens: int, most_rows: int) -> Iterator[Batch]:
    """Steps of at most `most_tokens` tokens and `most_rows` rows of logits, in order.

    A part also ends where a state is to be kept.
    """
    tokens, rows = size_of(advances)
    kept_at = [_states_kept_at(advance, most_tokens) for advance in advances]
    if tokens <= most_tokens and rows <= most_rows and not any(kept_at):
        yield from [Batch(advances, True)] if advances else []
        return
    batch = Batch()
    for advance, places in zip(advances, kept_at, strict=True):
        at = 0
        while at < len(advance.ids):
            stop = _stop(advance, at, most_tokens - batch.tokens, most_rows - batch.outputs)
            if stop <= at:
                yield batch
                batch = Batch()
                continue
            stop = min([stop, *(place for place in places if at < place)])
            batch.add(Part.of(advance, at, stop, stop in places))
            at = stop
            if at < len(advance.ids):  # a sequence has one part in a step
                yield batch
                batch = Batch()
    if batch.parts:
        batch.last = True
        yield batch


def _stop(advance: Advance, at: int, tokens: int, rows: int) -> int:
    """How far a part from `at` on may go where there is room for so many tokens and rows."""
    stop = min(at + tokens, len(advance.ids))
    wanted = advance.wanted
    first = bisect_left(wanted, at)
    return stop if len(wanted) - first <= rows else min(stop, wanted[first + rows])


def _states_kept_at(advance: Advance, most_tokens: int) -> list[int]:
    """Where in its tokens pieces have to end so that states can be kept.

    The next message of a chat often differs from the last tokens of this one (an empty thought
    that the template drops), and the same prompt again, for another answer, cannot go on from its
    end. Both would find no state near it. Short prompts are not cut, which costs them more than it
    saves, but for where others go on in another way.
    """
    if advance.state is None:
        return []
    n = len(advance.ids)
    branches = [place - advance.start for place in advance.before.branches]
    found = [n - _TAIL] if n > (_CUT if advance.closes else most_tokens) else []
    return found + [place for place in branches if 0 < place < n]
