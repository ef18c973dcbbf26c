"""Ragged batches: pieces of several sequences as the inputs of one step after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import index

import numpy as np

from runtime.errors import MemoryLimitError, OptionError
from runtime.session import Session

UBATCH = 512  # tokens of the largest step
_TAIL = 32  # tokens after the last state kept within a long prompt


@dataclass(slots=True)
class Piece:
    """Some tokens of a session: places start..start+len(ids)-1; `wanted` rows of logits.

    After a rewind the first ones may be tokens that the session has already.
    """

    index: int
    session: Session
    ids: list[int]
    start: int
    wanted: range  # offsets in `ids` whose logits are asked for
    message_end: bool = False  # of several tokens that were given together: the last, or near it

    def finish(self) -> None:
        """The step has ended: the session holds these tokens."""
        tokens, stop = self.session.tokens, self.start + len(self.ids)
        if stop > len(tokens):
            tokens.extend(self.ids[len(tokens) - self.start :])
        if self.session.state is not None:
            self.session.state.end(stop, self.message_end)


class Ubatch:
    """One step: its pieces, and which rows of which result its logits belong to."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.tokens = self.outputs = 0

    def add(self, piece: Piece) -> None:
        """One piece more, of a session that has none here."""
        self.pieces.append(piece)
        self.tokens += len(piece.ids)
        self.outputs += len(piece.wanted)

    @property
    def live(self) -> dict[str, int]:
        """How much of each capacity this step fills."""
        return {"tokens": self.tokens, "outputs": self.outputs, "sequences": len(self.pieces)}

    def inputs(self, components: int = 1) -> dict[str, np.ndarray]:
        """Step inputs, live parts only, of sessions that have reserved their memory.

        components: numbers of a position. Where there is recurrent state a step begins here.
        """
        single = self.tokens == len(self.pieces)
        found = self._single_tokens() if single else self._any_tokens()
        found["table"] = self._table()
        places = found["places"]
        found["positions"] = places
        if components > 1:  # of a text they are all the same
            found["positions"] = places.repeat(components).reshape(-1, components)
        states = [p.session.state for p in self.pieces]
        if states[0] is not None:
            slots = [state.begin() for state in states if state is not None]
            found["slot_in"], found["slot_out"] = np.array(slots, np.int32).T
            found["runs"] = self._runs()
        return found

    def _single_tokens(self) -> dict[str, np.ndarray]:
        """One token each: a decode step, where every microsecond counts."""
        pieces = self.pieces
        rows = [
            [p.ids[0] for p in pieces], [p.start for p in pieces],
            [p.session.table.slot(p.start) for p in pieces], range(len(pieces)),
        ]  # fmt: skip
        tokens, places, slots, sequences = np.array(rows, np.int32)
        wanted = [row for row, p in enumerate(pieces) if p.wanted]
        return {
            "tokens": tokens, "places": places, "slots": slots, "sequences": sequences,
            "output_rows": np.array(wanted, np.int32),
        }  # fmt: skip

    def _any_tokens(self) -> dict[str, np.ndarray]:
        columns: dict[str, list[np.ndarray]] = {
            n: [] for n in ("tokens", "places", "slots", "sequences", "output_rows")
        }
        at = 0
        for row, p in enumerate(self.pieces):
            n = len(p.ids)
            columns["tokens"].append(np.array(p.ids, np.int32))
            columns["places"].append(np.arange(p.start, p.start + n, dtype=np.int32))
            columns["slots"].append(p.session.table.slots(p.start, p.start + n))
            columns["sequences"].append(np.full(n, row, np.int32))
            columns["output_rows"].append(np.array(p.wanted, np.int32) + np.int32(at))
            at += n
        return {n: np.concatenate(parts) for n, parts in columns.items()}

    def _table(self) -> np.ndarray:
        rows = [p.session.table.row for p in self.pieces]
        if len(rows) == 1:
            return rows[0][None]
        table = np.zeros((len(rows), max(map(len, rows))), np.int32)
        for row, pages in zip(table, rows, strict=True):
            row[: len(pages)] = pages
        return table

    def _runs(self) -> np.ndarray:
        rows, at = [], 0
        for p in self.pieces:
            rows.append((at, len(p.ids)))
            at += len(p.ids)
        return np.array(rows, np.int32)


def token_ids(ids: Iterable[int]) -> list[int]:
    """Token ids as Python ints; OptionError for anything that is no whole number."""
    try:
        return list(map(index, ids))
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
        if min(ids) < 0 or max(ids) >= vocabulary:
            wrong = next(i for i in ids if not 0 <= i < vocabulary)
            raise OptionError(f"token id {wrong} is outside the vocabulary of {vocabulary}")
        session.check_open()
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
    """Steps of at most `most_tokens` tokens and `most_rows` rows of logits, in order.

    Tokens that a session has but must evaluate again are put in front of its new ones. A piece
    also ends where a state is to be kept.
    """
    step = Ubatch()
    for number, (session, new) in enumerate(batch):
        start = session.evaluated
        ids = new if start == len(session) else session.tokens[start:] + new
        first_row = len(ids) - {"all": len(new), "last": 1, "none": 0}[logits]
        keep_at = _state_kept_at(session, len(ids), most_tokens)
        at = 0
        while at < len(ids):
            room = most_tokens - step.tokens
            if logits == "all":
                room = min(room, most_rows - step.outputs)
            if room <= 0:
                yield step
                step = Ubatch()
                continue
            stop = min(at + room, len(ids))
            if at < keep_at < stop:
                stop = keep_at
            wanted = range(max(first_row - at, 0), stop - at)
            end = stop == keep_at or (stop == len(ids) and len(new) > 1)
            step.add(Piece(number, session, ids[at:stop], start + at, wanted, end))
            at = stop
            if at < len(ids):  # a session has one piece in a step
                yield step
                step = Ubatch()
    if step.pieces:
        yield step


def _state_kept_at(session: Session, n: int, most_tokens: int) -> int:
    """Where in n tokens a piece has to end so that its state can be kept; 0: nowhere.

    The next message of a chat often differs from the last tokens of this one (an empty thought
    that the template drops), and would find no state near them. Prompts of one step are not cut:
    that costs them more than it saves.
    """
    return n - _TAIL if session.state is not None and n > most_tokens else 0
