"""Session: one sequence of tokens and its place in the cache. Snapshot: a session held still."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from runtime.arguments import whole
from runtime.errors import OptionError
from runtime.memory.pages import Pages
from runtime.memory.slots import Recurrent
from runtime.ops.errors import shown

if TYPE_CHECKING:
    from runtime.model import Model

OnPrompt = Callable[[int, int], Any]  # tokens evaluated, tokens to evaluate


class Record(NamedTuple):
    """Everything about a sequence that changes, as one value.

    A change makes another record and puts it in place by one store. So whatever breaks off a
    change, at any point, leaves the old record or the new one; and what pages and slots are held
    is what the records of the open sequences say.
    """

    tokens: list[int]  # past `length`: nobody's, where the next record puts its tokens
    length: int
    pages: Pages
    state: Recurrent | None = None  # of models with recurrent layers
    closed: bool = False

    @property
    def evaluated(self) -> int:
        """How many tokens the next step need not evaluate."""
        return self.length if self.state is None else self.state.place

    def cut(self, length: int) -> Record:
        """Without what is past `length` tokens."""
        state = None if self.state is None else self.state.cut(length)
        return Record(self.tokens, length, self.pages.cut(length), state)

    def shared(self) -> Record:
        """The same once another sequence may hold its pages and slots."""
        state = None if self.state is None else self.state.shared()
        return Record(self.tokens, self.length, self.pages.shared(), state)

    def copy(self) -> Record:
        """The same for another sequence; this one has to be `shared`."""
        return Record(self.tokens[: self.length], self.length, self.pages.copy(), self.state)

    def without_memory(self) -> Record:
        """What is left of it when it is closed."""
        state = None if self.state is None else Recurrent()
        return Record(self.tokens, self.length, Pages.room(0), state, True)


class Holder:
    """Tokens, the pages of their keys and values, and their recurrent state, until closed."""

    _what = _made_by = ""

    def __init__(self, model: Model, record: Record) -> None:
        if not isinstance(record, Record):
            raise OptionError(f"{type(self).__name__} is not made directly: {self._made_by}")
        self.model = model
        self._record = record
        model._sequences.add(self)

    def __len__(self) -> int:
        return self._record.length

    def close(self) -> None:
        """Give its memory back; it cannot be used afterwards. Closing twice is once."""
        with self.model._lock:
            self._record = self._record.without_memory()

    def _check_open(self) -> None:
        """OptionError once it is closed."""
        if self._record.closed:
            raise OptionError(f"this {self._what}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce_ex__(self, _: object) -> Any:
        kind = type(self).__name__.lower()
        raise OptionError(
            f"a {kind} holds memory of its model and cannot be copied or pickled; session.fork() "
            "makes a second session, and session.tokens evaluated elsewhere give the same one"
        )


class Snapshot(Holder):
    """A session as it was, to go back to with `session.restore`. Made by `session.snapshot()`.

    It shares pages and state with the session and costs what the session changes afterwards: one
    page, and one slot of recurrent state. It outlives the session, not the model; `close` (or
    `with`, or forgetting it) gives its memory back.
    """

    _what = "snapshot is closed; make a new one with session.snapshot()"
    _made_by = "session.snapshot() makes one"

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens that the session had."""
        return tuple(self._record.tokens)

    def __repr__(self) -> str:
        return f"<Snapshot of {len(self)} tokens{', closed' if self._record.closed else ''}>"


class Session(Holder):
    """Tokens already evaluated, in order. Made by `model.session()`, continued by `eval`.

    Sessions of one model share its weights and its pools of memory. Calls from several threads
    come one after the other.
    """

    _what = "session is closed; make a new one with model.session()"
    _made_by = "model.session() makes one"

    @property
    def tokens(self) -> list[int]:
        """Its tokens, as a list of its own."""
        return self._record.tokens[: self._record.length]

    @property
    def evaluated(self) -> int:
        """How many tokens the next step need not evaluate: all, or after a rewind of a model
        with recurrent layers those up to the last state that was kept."""
        return self._record.evaluated

    def eval(
        self, ids: Iterable[int], logits: str = "all", on_prompt: OnPrompt | None = None
    ) -> np.ndarray:
        """Evaluate `ids` after what is there; float32 [len(ids), vocabulary] of the new tokens.

        logits: "all" rows, "last" for [1, vocabulary], "none" for [0, vocabulary]. on_prompt: see
        `Model.step`. An error, of whatever kind, leaves the session as it was.
        """
        return self.model.step([(self, ids)], logits, on_prompt)[0]

    def fork(self) -> Session:
        """A second session that continues from here; memory is shared until one writes."""
        with self.model._alone():
            return Session(self.model, self._share().copy())

    def snapshot(self) -> Snapshot:
        """This session as it is now, exactly; nothing is copied but the list of tokens."""
        with self.model._alone():
            record = self._share().copy()
            if record.state is not None:
                record = record._replace(state=record.state.alone())
            return Snapshot(self.model, record)

    def _share(self) -> Record:
        self._check_open()
        self._record = self._record.shared()
        return self._record

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from a snapshot of this or another session of the same model.

        What the session held is given back. OptionError, and nothing has changed, for a closed
        snapshot or one of another model.
        """
        with self.model._alone():
            self._check_open()
            if not isinstance(snapshot, Snapshot):
                raise OptionError(
                    f"restore takes a snapshot made by session.snapshot(), not {shown(snapshot)}"
                )
            if snapshot.model is not self.model:
                raise OptionError(_foreign(snapshot.model, self.model))
            snapshot._check_open()
            record = snapshot._record.copy()
            if self._record.state is not None and record.state is not None:
                same = min(self._kept_of(record), record.state.place)
                past = self._record.state.cut(same).checkpoints
                state = record.state._replace(checkpoints=past).kept(message_end=True)
                record = record._replace(state=state)
            self._record = record

    def _kept_of(self, other: Record) -> int:
        """The last place of a checkpoint up to which the tokens of another are its own."""
        own = self._record
        places = [c.place for c in own.state.checkpoints] if own.state is not None else []
        for place in reversed(places):
            if place <= other.length and own.tokens[:place] == other.tokens[:place]:
                return place
        return 0

    def rewind(self, n: int) -> None:
        """Drop the last n tokens; OptionError when there are fewer.

        In a model with recurrent layers the state goes back to the nearest place before that is
        kept (see runtime.memory.slots); the next step evaluates the tokens from there again. The
        bits are those of a session that never went further.
        """
        n = whole("n", n, 0)
        with self.model._alone():
            self._check_open()
            if n > len(self):
                raise OptionError(f"cannot rewind {n} tokens of a session of {len(self)}")
            self._record = self._record.cut(len(self) - n)

    def __repr__(self) -> str:
        state = ", closed" if self._record.closed else ""
        return f"<Session {len(self)} of {self.model.context} tokens{state}>"


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
