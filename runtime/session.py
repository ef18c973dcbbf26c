"""Session: one sequence of tokens and its place in the cache. Snapshot: a session held still."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from runtime.arguments import file_path, whole, wrong
from runtime.engine.engine import Engine, OnPrompt
from runtime.engine.sequence import Record, Sequence
from runtime.errors import OptionError
from runtime.ops.errors import shown

if TYPE_CHECKING:
    from runtime.model import Model


class Held:
    """What a user has of a sequence of a model, until it is closed or forgotten."""

    _what = _made_by = ""

    def __init__(self, model: Model, record: Record, cached: bool = True) -> None:
        if not isinstance(record, Record):
            raise OptionError(f"{type(self).__name__} is not made directly: {self._made_by}")
        self.model = model
        self._sequence = model._engine.sequence(record, f"this {self._what}", cached)

    def __len__(self) -> int:
        return self._sequence.record.length

    def close(self) -> None:
        """Give its memory back; it cannot be used afterwards. Closing twice is once."""
        self.model._engine.end(self._sequence)

    def _open(self) -> Sequence:
        """Its sequence; OptionError once it is closed."""
        if self._sequence.record.closed:
            raise OptionError(self._sequence.closed_error)
        return self._sequence

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce_ex__(self, _: object) -> Any:
        kind = type(self).__name__.lower()
        raise OptionError(
            f"a {kind} holds memory of its model and cannot be copied or pickled; session.fork() "
            "makes a second session, and session.save(path) a file that other processes load"
        )


class Snapshot(Held):
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
        return tuple(self._sequence.record.tokens)

    def __repr__(self) -> str:
        state = ", closed" if self._sequence.record.closed else ""
        return f"<Snapshot of {len(self)} tokens{state}>"


class Session(Held):
    """Tokens already evaluated, in order. Made by `model.session()`, continued by `eval`.

    Sessions of one model share its weights and its pools of memory. Calls from several threads
    come one after the other.
    """

    _what = "session is closed; make a new one with model.session()"
    _made_by = "model.session() makes one"

    @property
    def tokens(self) -> list[int]:
        """Its tokens, as a list of its own."""
        record = self._sequence.record
        return record.tokens[: record.length]

    @property
    def evaluated(self) -> int:
        """How many tokens the next step need not evaluate: all, or after a rewind of a model
        with recurrent layers those up to the last state that was kept."""
        return self._sequence.record.evaluated

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
        with self.model._engine.alone():
            return Session(self.model, self._open().share().copy(), self._sequence.cached)

    def snapshot(self) -> Snapshot:
        """This session as it is now, exactly; nothing is copied but the list of tokens."""
        with self.model._engine.alone():
            record = self._open().share().copy()
            if record.state is not None:
                record = record._replace(state=record.state.alone())
            return Snapshot(self.model, record, self._sequence.cached)

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from a snapshot of this or another session of the same model.

        What the session held is given back. OptionError, and nothing has changed, for a closed
        snapshot or one of another model.
        """
        with self.model._engine.alone():
            own = self._open()
            if not isinstance(snapshot, Snapshot):
                raise OptionError(
                    f"restore takes a snapshot made by session.snapshot(), not {shown(snapshot)}"
                )
            if snapshot.model is not self.model:
                raise OptionError(_foreign(snapshot.model, self.model))
            record = snapshot._open().record.copy()
            if own.record.state is not None and record.state is not None:
                same = min(_kept_of(own.record, record), record.state.place)
                past = own.record.state.cut(same).checkpoints
                state = record.state._replace(checkpoints=past).kept(message_end=True)
                record = record._replace(state=state)
            own.record = record

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, from which `Session.load` makes it again without evaluating a token.

        All of it or nothing: a file that was there stays until the new one is on the disk. It has
        the tokens, their keys and values (as many bytes as they take in memory), and of a model
        with recurrent layers the state and those at the ends of the last messages. Only the user
        can read it. Where `path` is a symbolic link, the file that it leads to is replaced. Raises
        FileError where it cannot be written, or something else than a file is there.
        """
        save_session(self, path, {})

    @staticmethod
    def load(model: Model, path: str | os.PathLike[str]) -> Session:
        """A session that was saved, of the same model, in the memory of `model`.

        Its next logits have the bits they would have had, on any arrangement of devices that
        compute alike (so "cpu" and "tensor(cpu:0,cpu:1)"). Raises FileError for a file that is
        damaged, or of another model, cache type or version, naming both sides of the first
        difference; MemoryLimitError where there is no room for it.
        """
        return load_session(model, path)[0]

    def rewind(self, n: int) -> None:
        """Drop the last n tokens; OptionError when there are fewer.

        In a model with recurrent layers the state goes back to the nearest place before that is
        kept (see runtime.memory.slots); the next step evaluates the tokens from there again. The
        bits are those of a session that never went further.
        """
        n = whole("n", n, 0)
        with self.model._engine.alone():
            own = self._open()
            if n > len(self):
                raise OptionError(f"cannot rewind {n} tokens of a session of {len(self)}")
            own.record = own.record.cut(len(self) - n)

    def __repr__(self) -> str:
        state = ", closed" if self._sequence.record.closed else ""
        return f"<Session {len(self)} of {self.model.context} tokens{state}>"


def save_session(session: Session, path: str | os.PathLike[str], beside: Mapping[str, Any]) -> None:
    """Write a session to a file. beside: what else to keep there, as JSON has it."""
    from runtime.session_file import save

    target, engine = Path(file_path("path", path)), session.model._engine
    with engine.alone():
        record = session._open().share().copy()
        held = engine.sequence(record, "it is being saved", cached=False)
    try:
        save(session.model, held.record, target, beside)
    finally:
        held.close()


def load_session(model: Model, path: str | os.PathLike[str]) -> tuple[Session, dict[str, Any]]:
    """A saved session, and what was kept beside it."""
    from runtime.session_file import load

    if not isinstance(getattr(model, "_engine", None), Engine):
        raise wrong("model", model, "a model made by runtime.load()")
    source = Path(file_path("path", path))
    with model._engine.alone():
        record, beside = load(model, source)
        return Session(model, record), beside


def _kept_of(own: Record, other: Record) -> int:
    """The last place of a checkpoint of one up to which the tokens of the other are the same."""
    places = [c.place for c in own.state.checkpoints] if own.state is not None else []
    for place in reversed(places):
        if place <= other.length and own.tokens[:place] == other.tokens[:place]:
            return place
    return 0


def _foreign(theirs: Model, ours: Model) -> str:
    """Why a snapshot cannot be restored: one line that names the first difference."""
    for what, a, b in (
        ("model", theirs.file.path, ours.file.path),
        ("kv_type", ",".join(theirs.kv_types), ",".join(ours.kv_types)),
        ("cache_rotation", theirs.cache_rotation, ours.cache_rotation),
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
