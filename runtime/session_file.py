"""Sessions in files: what `session.save` writes and `Session.load` reads.

A file is a run of blocks (see memory/block_file.py): one that says what follows, a page for each
PAGE tokens, one for the tokens behind the last whole page, and of models with recurrent layers the
states that the session can go back to. It is of no arrangement of devices.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.engine.engine import Engine, check_room
from runtime.engine.identity import difference, fingerprint
from runtime.engine.plain_state import TOGETHER
from runtime.engine.sequence import Record
from runtime.errors import FileError, MemoryLimitError, OptionError
from runtime.memory.block_file import (
    END,
    HEAD,
    NOT_REGULAR,
    PAGES,
    SESSION,
    Block,
    DamagedError,
    opened,
    parsed,
    read_block,
    write_block,
)
from runtime.memory.pages import Pages
from runtime.memory.prefix_edges import KEY, block_key
from runtime.memory.slots import Checkpoint, Recurrent
from runtime.ops import PAGE
from runtime.outputs import in_place

if TYPE_CHECKING:
    from runtime.model import Model

_STATES = 4  # of a session that a file keeps: where it is, and the ends of the last messages
_MOST_ABOUT = 256 << 20  # bytes of what a file says about itself
_NOTHING = bytes(KEY)


def save(model: Model, record: Record, path: Path, beside: Mapping[str, Any]) -> None:
    """Write the sequence of a record, which is held and shared, to a file: all of it or nothing.

    beside: what else is to be kept, as JSON has it. FileError: it cannot be written, and what was
    there is as it was.
    """
    engine = model._engine
    if not engine.backend.bits:
        raise OptionError(
            f"sessions of {engine.backend.name} cannot be saved: its states are wider than files"
        )
    try:
        whole = _place(path)
        with in_place(whole, private=True) as file:
            for block, payload in _blocks(engine, record, beside):
                write_block(file.fileno(), block, payload)
            os.fsync(file.fileno())
        _sync(whole.parent)
    except OSError as error:
        raise FileError(
            f"{path}: the session cannot be written ({error.strerror or error}); "
            "a file that was there is as it was"
        ) from None


def load(model: Model, path: Path) -> tuple[Record, dict[str, Any]]:
    """The record of a saved session in the memory of a model, and what was kept beside.

    The caller holds the engine's lock until somebody holds the record. FileError: it is no such
    file, damaged, or of another model. MemoryLimitError: there is no room.
    """
    try:
        with opened(_place(path)) as file:
            return _Reader(model, path, file.fileno()).record()
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror or error})") from None
    except DamagedError as error:
        raise FileError(f"{path}: no saved session can be read from it: {error}") from None


def _blocks(
    engine: Engine, record: Record, beside: Mapping[str, Any]
) -> Iterator[tuple[Block, np.ndarray]]:
    whose = key = fingerprint(engine.identity)
    states = _states(record)
    about = {
        "identity": engine.identity, "model": str(engine.file.path), "length": record.length,
        "given": record.given, "states": [place for place, _ in states], "beside": dict(beside),
    }  # fmt: skip
    text = np.frombuffer(json.dumps(about).encode(), np.uint8)
    yield Block(SESSION, whose, _NOTHING, _NOTHING, 0, (), text.nbytes), text
    rows, plain = record.pages.held.tolist(), engine.plain
    for start in range(0, record.length, TOGETHER * PAGE):
        with engine.alone():
            engine.check_open()
            pages = plain.pages(rows[start // PAGE : start // PAGE + TOGETHER])
        for n, page in enumerate(pages):
            first = start + n * PAGE
            tokens = tuple(record.tokens[first : min(first + PAGE, record.length)])
            kind, parent, key = PAGES, key, block_key(key, tokens)
            if len(tokens) < PAGE:
                kind, page = END, plain.without(page, len(tokens))
            yield Block(kind, whose, key, parent, first, tokens, page.nbytes), page
    for place, slot in states:
        with engine.alone():
            engine.check_open()
            state = plain.slot(slot)
        yield Block(END, whose, key, key, place, (), state.nbytes), state


def _states(record: Record) -> list[tuple[int, int]]:
    """(place, slot) of the states that are kept, in order."""
    if record.state is None or record.state.slot < 0:
        return []
    ends = {c.place: c.slot for c in record.state.checkpoints if c.message_end}
    return sorted((ends | {record.state.place: record.state.slot}).items())[-_STATES:]


class _Reader:
    """One open file of a session, read into the memory of a model."""

    def __init__(self, model: Model, path: Path, file: int) -> None:
        self._engine, self._path, self._file = model._engine, path, file
        self._whose = fingerprint(self._engine.identity)
        self.about = self._about()

    def record(self) -> tuple[Record, dict[str, Any]]:
        engine, length = self._engine, self.about["length"]
        engine.check_open()
        wrong = difference(self.about["identity"], engine.identity)
        if wrong:
            raise FileError(f"{self._path}: this session cannot be continued: {wrong}")
        check_room(0, length, engine.context)
        places, plain = self.about["states"], engine.plain
        nbytes = -(-length // PAGE) * (HEAD + plain.page_nbytes)
        nbytes += len(places) * (HEAD + plain.slot_nbytes)
        if os.fstat(self._file).st_size != self._at + nbytes:
            raise DamagedError("it is cut short, or longer than it says")
        (pages,) = engine.pools.pages.prepare([(Pages.room(engine.context), 0, length)])
        if isinstance(pages, MemoryLimitError):
            raise pages
        tokens = self._read_pages(pages, length)
        state = self._read_states(places, nbytes) if engine.memory.slots else None
        record = Record(tokens, length, pages.shared(), [], state, given=self.about["given"])
        return record, self.about["beside"]

    def _about(self) -> dict[str, Any]:
        """What the file says about itself, in its first block."""
        head = parsed(os.read(self._file, HEAD))
        if head.kind != SESSION or head.nbytes > _MOST_ABOUT:
            raise DamagedError("it is a block of a cache, and not a session")
        text = np.empty(head.nbytes, np.uint8)
        read_block(self._file, text)
        self._at = HEAD + head.nbytes  # of the first page
        about = json.loads(text.tobytes())
        for name, kind in _ABOUT.items():
            if not isinstance(about.get(name), kind):
                raise DamagedError(f"it does not say {name}")
        return about

    def _read_pages(self, pages: Pages, length: int) -> list[int]:
        tokens, keys = list[int](), [self._whose]

        def read(n: int, out: np.ndarray) -> bool:
            block = read_block(self._file, out, self._at + n * (HEAD + out.nbytes))
            self._check(block, n * PAGE, min(PAGE, length - n * PAGE), keys[-1])
            keys.append(block_key(keys[-1], block.tokens))
            tokens.extend(block.tokens)
            return block.key == keys[-1]

        if self._engine.plain.write_from(pages.held.tolist(), read) < pages.used:
            raise DamagedError("it is damaged")
        return tokens

    def _read_states(self, places: list[int], end: int) -> Recurrent:
        plain = self._engine.plain
        if not places:
            return Recurrent()
        slots = self._engine.pools.free_slots(len(places))
        kept = places[-len(slots) :]
        room, checkpoints = np.empty(plain.slot_nbytes, np.uint8), []
        for place, slot in zip(kept, slots, strict=True):
            back = len(places) - places.index(place)
            at = self._at + end - back * (HEAD + room.nbytes)
            self._check(read_block(self._file, room, at), place, 0, None)
            plain.write_slot(slot, room)
            checkpoints.append(Checkpoint(place, slot, True))
        return Recurrent(slots[-1], kept[-1], tuple(checkpoints))

    def _check(self, block: Block, start: int, tokens: int, parent: bytes | None) -> None:
        """DamagedError: a block is not the one that belongs there."""
        is_it = block.fingerprint == self._whose and block.start == start
        if not is_it or len(block.tokens) != tokens or parent not in (None, block.parent):
            raise DamagedError("it is put together of several files")


_ABOUT: dict[str, type] = {
    "identity": dict, "length": int, "given": int, "states": list, "beside": dict
}  # fmt: skip


def _place(path: Path) -> Path:
    """The file that a path leads to, which need not be there. OSError: whatever else it is of."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        pass
    except ValueError as error:  # it has a character that no path has
        raise OSError(errno.EINVAL, str(error)) from None
    else:
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, NOT_REGULAR)
    return Path(os.path.realpath(path))


def _sync(folder: Path) -> None:
    """The folder's new entry is on the disk, too, where systems have that."""
    with contextlib.suppress(OSError):
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
