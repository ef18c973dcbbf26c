"""Session: one sequence of tokens and its place in the cache. Snapshot: a session held still."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from runtime.errors import OptionError
from runtime.memory.pages import BlockTable
from runtime.memory.slots import Recurrent

if TYPE_CHECKING:
    from runtime.model import Model

OnPrompt = Callable[[int, int], Any]  # tokens evaluated, tokens to evaluate


class _Sequence:
    """Tokens, the pages of their keys and values, and their recurrent state, until closed."""

    _what = ""

    def __init__(
        self, model: Model, tokens: Sequence[int], table: BlockTable, state: Recurrent | None
    ) -> None:
        self._closed = True  # until everything is set: __del__ may come at any time
        self.model = model
        self._table, self._state = table, state
        self.tokens = tokens
        self._closed = False
        model.holders.add(self)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def table(self) -> BlockTable:
        """Pages of this sequence; OptionError once it is closed."""
        self.check_open()
        return self._table

    @property
    def state(self) -> Recurrent | None:
        """Recurrent state, of models that have such layers."""
        return self._state

    def close(self) -> None:
        """Give its memory back; it cannot be used afterwards. Closing twice is once."""
        with self.model.lock:
            if not self._closed:
                self._closed = True
                self._table.truncate(0)
                if self._state is not None:
                    self._state.close()

    def check_open(self) -> None:
        """OptionError once it is closed."""
        if self._closed:
            raise OptionError(f"this {self._what}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # No lock here: a collection may come in the middle of anything, in any thread.
        if not getattr(self, "_closed", True):
            self._table.abandon()
            if self._state is not None:
                self._state.abandon()


class Snapshot(_Sequence):
    """A session as it was, to go back to with `session.restore`. Made by `session.snapshot()`.

    It shares pages and state with the session and costs what the session changes afterwards: one
    page, and one slot of recurrent state. It outlives the session, not the model; `close` (or
    `with`, or forgetting it) gives its memory back.
    """

    _what = "snapshot is closed; make a new one with session.snapshot()"
    tokens: tuple[int, ...]

    def __repr__(self) -> str:
        return f"<Snapshot of {len(self)} tokens{', closed' if self._closed else ''}>"


class Session(_Sequence):
    """Tokens already evaluated, in order. Made by `model.session()`, continued by `eval`.

    Sessions of one model share its weights and its pools of memory. Calls from several threads
    come one after the other.
    """

    _what = "session is closed; make a new one with model.session()"
    tokens: list[int]

    @property
    def evaluated(self) -> int:
        """How many tokens the next step need not evaluate: all, or after a rewind of a model
        with recurrent layers those up to the last state that was kept."""
        return len(self.tokens) if self._state is None else self._state.place

    def eval(
        self, ids: Sequence[int], logits: str = "all", on_prompt: OnPrompt | None = None
    ) -> np.ndarray:
        """Evaluate `ids` after what is there; float32 [len(ids), vocabulary] of the new tokens.

        logits: "all" rows, "last" for [1, vocabulary], "none" for [0, vocabulary]. on_prompt: see
        `Model.step`. An error, of whatever kind, leaves the session as it was.
        """
        return self.model.step([(self, ids)], logits, on_prompt)[0]

    def fork(self) -> Session:
        """A second session that continues from here; memory is shared until one writes."""
        with self.model.lock:
            table = self.table.fork()
            state = None if self._state is None else self._state.fork()
            return Session(self.model, list(self.tokens), table, state)

    def snapshot(self) -> Snapshot:
        """This session as it is now, exactly; nothing is copied but the list of tokens."""
        with self.model.lock:
            table = self.table.fork()
            state = None if self._state is None else self._state.still()
            return Snapshot(self.model, tuple(self.tokens), table, state)

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from a snapshot of this or another session of the same model.

        What the session held is given back. OptionError, and nothing has changed, for a closed
        snapshot or one of another model.
        """
        with self.model.lock:
            self.check_open()
            if not isinstance(snapshot, Snapshot):
                raise OptionError(
                    f"restore takes a snapshot made by session.snapshot(), not {snapshot!r:.60}"
                )
            if snapshot.model is not self.model:
                raise OptionError(_foreign(snapshot.model, self.model))
            table = snapshot.table.fork()
            if self._state is not None and snapshot.state is not None:
                self._state.restore(snapshot.state, self._kept_of(snapshot.tokens))
            self._table.truncate(0)
            self._table, self.tokens = table, list(snapshot.tokens)

    def _kept_of(self, tokens: Sequence[int]) -> int:
        """The last place of a checkpoint up to which these tokens are the session's own."""
        places = [c.place for c in self._state.checkpoints] if self._state is not None else []
        for place in reversed(places):
            if place <= len(tokens) and tuple(self.tokens[:place]) == tokens[:place]:
                return place
        return 0

    def rewind(self, n: int) -> None:
        """Drop the last n tokens; OptionError when there are fewer.

        In a model with recurrent layers the state goes back to the nearest place before that is
        kept (see runtime.memory.slots); the next step evaluates the tokens from there again. The
        bits are those of a session that never went further.
        """
        with self.model.lock:
            self.check_open()
            if not 0 <= n <= len(self.tokens):
                raise OptionError(f"cannot rewind {n} tokens of a session of {len(self.tokens)}")
            self.cut_to(len(self.tokens) - n)

    def cut_to(self, length: int) -> None:
        """Drop what is past `length` tokens, the remains of a step that failed included."""
        del self.tokens[length:]
        self._table.truncate(length)
        if self._state is not None:
            self._state.rewind(length)

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ""
        return f"<Session {len(self.tokens)} of {self.model.context} tokens{state}>"


def _foreign(theirs: Model, ours: Model) -> str:
    """Why a snapshot cannot be restored: one line that names the first difference."""
    for what, a, b in (
        ("model", theirs.file.path, ours.file.path),
        ("kv_type", ",".join(theirs.kv_types), ",".join(ours.kv_types)),
        ("device", theirs.backend.name, ours.backend.name),
    ):
        if a != b:
            return (
                f"the snapshot is of {what} {a}, this session of {what} {b}; snapshots only "
                "restore in sessions of the model that made them"
            )
    return (
        "the snapshot is of another load of this model; snapshots only restore in sessions of "
        "the model that made them"
    )
