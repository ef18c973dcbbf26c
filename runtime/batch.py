"""Ragged batches: pieces of several sequences as the inputs of one step after another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.advance import Advance
from runtime.arguments import listed, shown, token_ids, wrong
from runtime.errors import MemoryLimitError, OptionError
from runtime.session import Session

if TYPE_CHECKING:
    from runtime.model import Model

UBATCH = 512  # tokens of the largest step
_ROW_MACS = 64 << 30  # of one row of a plan, so that who presses Ctrl-C need not wait for its end
_TAIL = 32  # tokens after the last state kept within a long prompt


@dataclass(slots=True)
class Piece:
    """Some tokens of a session: places start..start+len(ids)-1; `wanted` rows of logits.

    After a rewind the first ones may be tokens that the session has already.
    """

    index: int
    advance: Advance
    ids: list[int]
    start: int
    wanted: range  # offsets in `ids` whose logits are asked for
    message_end: bool = False  # of several tokens that were given together: the last, or near it

    def finish(self) -> None:
        """The step has ended."""
        self.advance.end(self.start + len(self.ids), self.message_end)


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
        """Step inputs, live parts only, of sessions whose memory is prepared.

        components: numbers of a position.
        """
        single = self.tokens == len(self.pieces)
        found = self._single_tokens() if single else self._any_tokens()
        found["table"] = self._table()
        places = found["places"]
        found["positions"] = places
        if components > 1:  # of a text they are all the same
            found["positions"] = places.repeat(components).reshape(-1, components)
        if self.pieces[0].advance.state is not None:
            slots = [p.advance.slots for p in self.pieces]
            found["slot_in"], found["slot_out"] = np.array(slots, np.int32).T
            found["runs"] = self._runs()
        return found

    def _single_tokens(self) -> dict[str, np.ndarray]:
        """One token each: a decode step, where every microsecond counts."""
        pieces = self.pieces
        rows = [
            [p.ids[0] for p in pieces], [p.start for p in pieces],
            [p.advance.pages.slot(p.start) for p in pieces], range(len(pieces)),
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
            columns["slots"].append(p.advance.pages.slots(p.start, p.start + n))
            columns["sequences"].append(np.full(n, row, np.int32))
            columns["output_rows"].append(np.array(p.wanted, np.int32) + np.int32(at))
            at += n
        return {n: np.concatenate(parts) for n, parts in columns.items()}

    def _table(self) -> np.ndarray:
        rows = [p.advance.pages.held for p in self.pieces]
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


def pairs(batch: Any, model: Model) -> list[tuple[Session, list[int]]]:
    """The sessions of a step and their new tokens; OptionError for what is no such batch."""
    found = []
    given = (
        batch if type(batch) is list else listed("batch", batch, "a list of (session, ids) pairs")
    )
    for entry in given:
        try:
            session, ids = entry
        except (TypeError, ValueError):
            raise OptionError(f"a step takes (session, ids) pairs, not {shown(entry)}") from None
        if not isinstance(session, Session):
            raise OptionError(
                f"a step takes sessions made by model.session(), not {shown(session)}"
            )
        if session.model is not model:
            raise OptionError("a session can only be evaluated by the model that made it")
        found.append((session, token_ids(ids)))
    return found


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


def check(
    batch: Sequence[tuple[Session, list[int]]], logits: str, vocabulary: int, context: int
) -> None:
    """OptionError or MemoryLimitError for what a step cannot take; nothing has happened yet."""
    if not isinstance(logits, str) or logits not in ("all", "last", "none"):
        raise wrong("logits", logits, "'all', 'last' or 'none'")
    if len({id(s) for s, _ in batch}) != len(batch):
        raise OptionError("a session stands twice in one step; join its tokens")
    for session, ids in batch:
        if not ids:
            raise OptionError("there are no tokens to evaluate; give at least one id")
        if min(ids) < 0 or max(ids) >= vocabulary:
            outside = next(i for i in ids if not 0 <= i < vocabulary)
            raise OptionError(
                f"token id {shown(outside)} is outside the vocabulary of {vocabulary}"
            )
        session._check_open()
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
    advances: Sequence[Advance], logits: str, most_tokens: int, most_rows: int
) -> Iterator[Ubatch]:
    """Steps of at most `most_tokens` tokens and `most_rows` rows of logits, in order.

    A piece also ends where a state is to be kept.
    """
    step = Ubatch()
    for number, advance in enumerate(advances):
        ids, start = advance.ids, advance.start
        first_row = len(ids) - {"all": advance.new, "last": 1, "none": 0}[logits]
        keep_at = _state_kept_at(advance, most_tokens)
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
            end = stop == keep_at or (stop == len(ids) and advance.new > 1)
            step.add(Piece(number, advance, ids[at:stop], start + at, wanted, end))
            at = stop
            if at < len(ids):  # a session has one piece in a step
                yield step
                step = Ubatch()
    if step.pieces:
        yield step


def _state_kept_at(advance: Advance, most_tokens: int) -> int:
    """Where in its tokens a piece has to end so that its state can be kept; 0: nowhere.

    The next message of a chat often differs from the last tokens of this one (an empty thought
    that the template drops), and would find no state near them. Prompts of one step are not cut:
    that costs them more than it saves.
    """
    n = len(advance.ids)
    return n - _TAIL if advance.state is not None and n > most_tokens else 0
