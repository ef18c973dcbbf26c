"""Ragged batches: pieces of several sequences as the inputs of one step after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import index

import numpy as np

from runtime.errors import MemoryLimitError, OptionError
from runtime.session import Session

UBATCH = 512  # tokens of the largest step


@dataclass
class Piece:
    """Some new tokens of a session: places start..start+len(ids)-1; `wanted` rows of logits."""

    index: int
    session: Session
    ids: list[int]
    start: int
    wanted: range  # offsets in `ids` whose logits are asked for


@dataclass
class Ubatch:
    """One step: its pieces, and which rows of which result its logits belong to."""

    pieces: list[Piece] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(p.ids) for p in self.pieces)

    @property
    def outputs(self) -> int:
        return sum(len(p.wanted) for p in self.pieces)

    def inputs(self) -> dict[str, np.ndarray]:
        """Step inputs, live parts only; pages are reserved as a side effect."""
        table = np.zeros((len(self.pieces), max(len(p.session.table.row) for p in self.pieces)))
        columns: dict[str, list[np.ndarray]] = {
            n: [] for n in ("tokens", "places", "slots", "sequences", "output_rows")
        }
        runs = np.zeros((len(self.pieces), 2), np.int32)
        at = 0
        for row, p in enumerate(self.pieces):
            n = len(p.ids)
            columns["tokens"].append(np.array(p.ids))
            columns["places"].append(np.arange(p.start, p.start + n))
            columns["slots"].append(p.session.table.slots(p.start, p.start + n))
            columns["sequences"].append(np.full(n, row))
            columns["output_rows"].append(np.array(p.wanted) + at)
            table[row, : len(p.session.table.row)] = p.session.table.row
            runs[row] = at, n
            at += n
        found = {n: np.concatenate(parts).astype(np.int32) for n, parts in columns.items()}
        found |= {"positions": found["places"], "runs": runs}
        return {**found, "table": table.astype(np.int32)}


def token_ids(ids: Iterable[int]) -> list[int]:
    """Token ids as Python ints; OptionError for anything that is no whole number."""
    try:
        return [index(i) for i in ids]
    except TypeError:
        raise OptionError(
            f"token ids must be a list of whole numbers, got {ids!r:.60}; "
            "text becomes ids with model.tokenizer.encode(text)"
        ) from None


def check(
    batch: Sequence[tuple[Session, list[int]]], logits: str, vocabulary: int, context: int
) -> None:
    """OptionError or MemoryLimitError for what a step cannot take; nothing has happened yet."""
    if logits not in ("all", "last", "none"):
        raise OptionError(f"logits={logits!r} must be 'all', 'last' or 'none'")
    if len({id(s) for s, _ in batch}) != len(batch):
        raise OptionError("a session stands twice in one step; join its tokens")
    for session, ids in batch:
        if not ids:
            raise OptionError("there are no tokens to evaluate; give at least one id")
        wrong = next((i for i in ids if not 0 <= i < vocabulary), None)
        if wrong is not None:
            raise OptionError(f"token id {wrong} is outside the vocabulary of {vocabulary}")
        check_room(len(session), len(ids), context)


def check_room(present: int, new: int, context: int) -> None:
    """MemoryLimitError when a session of `present` tokens cannot take `new` more."""
    if present + new > context:
        before = f"{present} + {new}" if present else str(new)
        raise MemoryLimitError(
            f"{before} tokens do not fit in context={context}; "
            "shorten the prompt or load the model with a larger context"
        )


def cut(
    batch: Sequence[tuple[Session, list[int]]], logits: str, most_tokens: int, most_rows: int
) -> Iterator[Ubatch]:
    """Steps of at most `most_tokens` tokens and `most_rows` rows of logits, in order."""
    # Sessions grow while their steps run, between two turns of this generator.
    lengths = [len(session) for session, _ in batch]
    step = Ubatch()
    for number, (session, ids) in enumerate(batch):
        ids = list(ids)
        first_row = {"all": 0, "last": len(ids) - 1, "none": len(ids)}[logits]
        at = 0
        while at < len(ids):
            room = most_tokens - step.tokens
            if logits == "all":
                room = min(room, most_rows - step.outputs)
            if room <= 0:
                yield step
                step = Ubatch()
                continue
            n = min(room, len(ids) - at)
            wanted = range(max(first_row - at, 0), n)
            start = lengths[number] + at
            step.pieces.append(Piece(number, session, ids[at : at + n], start, wanted))
            at += n
            if len({p.index for p in step.pieces}) < len(step.pieces):
                raise AssertionError("a session has two pieces in one step")
    if step.pieces:
        yield step
