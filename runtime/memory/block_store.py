"""The disk tier of the cache of prompts: one file a block, in a folder for each fingerprint.

    FOLDER/prompts/<fingerprint>/about.json      what the fingerprint is of, for people
                                /<key>.page      K and V of PAGE tokens
                                /<parent>-<tokens>-<key>.end

A block's key is of all tokens up to its end, of the fingerprint and of nothing else, so whoever
has it has the right one, and writing it twice is writing the same. A file has its name when all of
it is written, no lock is held, and what a power cut leaves half written is told by its checksum.
Processes share a folder: a block that another one has just removed is one that is not there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from runtime.memory.block_file import (
    END,
    HEAD,
    PAGES,
    Block,
    DamagedError,
    opened,
    read_block,
    write_block,
)
from runtime.memory.disk_budget import ABOUT, DiskBudget, largest
from runtime.outputs import in_place

FOLDER = "prompts"
_AGAIN = 60.0  # seconds after which a disk that was full is tried again
_TICK = 50_000_000  # nanoseconds


class Tail(NamedTuple):
    """A block that ends within a page: so many tokens after its parent."""

    tokens: int
    key: bytes


class BlockStore:
    """Blocks of one fingerprint, which is also the key before a prompt's first block.

    Nothing here is ever an error: what cannot be read is not there, what cannot be written is not
    kept, and a line on stderr says so, once.
    """

    def __init__(
        self, cache_dir: Path, fingerprint: bytes, about: Mapping[str, str],
        budget: int | None = None,
    ) -> None:  # fmt: skip
        """about: what the fingerprint is of, by name. budget: bytes on disk of all models
        together; by default, and at most, see `largest`."""
        self.root = cache_dir / FOLDER
        self.folder, self.fingerprint = self.root / fingerprint.hex(), fingerprint
        self._about, self._said = dict(about), set[str]()
        self._names, self._ends = set[str](), dict[bytes, set[Tail]]()
        self._listed: int | None = None  # when the folder had changed last, as it was listed
        self._rest = 0.0  # not to be written to before then
        self.usable, self._made = self._looked(), False
        self._budget = DiskBudget(self.root, largest(self.root, budget) if self.usable else 0)
        self.refresh()

    @property
    def budget(self) -> int:
        """Bytes on disk of all models together."""
        return self._budget.most

    def refresh(self) -> None:
        """Know what the folder holds now: other processes write and remove, too."""
        try:
            changed = self.folder.stat().st_mtime_ns
            if changed == self._listed or not self.usable:
                return
            names = {each.name for each in os.scandir(self.folder)}
        except OSError:
            self._listed, self._names, self._ends = None, set(), {}
            return
        ends: dict[bytes, set[Tail]] = {}
        for name in names:
            if name.endswith(f".{END}"):
                with contextlib.suppress(ValueError):
                    parent, tail = _end_of(name)
                    ends.setdefault(parent, set()).add(tail)
        # the clock of a file system ticks slowly: a second change may look like the first
        settled = time.time_ns() - changed > _TICK
        self._listed, self._names, self._ends = changed if settled else None, names, ends

    def has(self, key: bytes) -> bool:
        """Whether there is such a page, as far as is known without looking again."""
        return _page_name(key) in self._names

    def has_end(self, parent: bytes, tail: Tail) -> bool:
        """The same of an end."""
        return _end_name(parent, tail) in self._names

    def ends(self, parent: bytes) -> list[Tail]:
        """What is known to end within the page after `parent`, the longest first."""
        known = self._ends.get(parent, ())
        return sorted((tail for tail in known if self.has_end(parent, tail)), reverse=True)

    def write(self, block: Block, payload: np.ndarray) -> bool:
        """Keep a block, uint8 payload; False: it is not, the disk cannot be written just now."""
        name = _name(block)
        if not self.usable or time.monotonic() < self._rest:
            return False
        if name in self._names:
            return True
        try:
            if not self._budget.reserve(payload.nbytes + HEAD):
                return False
            if not self._made and not self._make():
                return False
            self._in_place(name, lambda file: write_block(file, block, payload))
        except OSError as error:
            self._rest = time.monotonic() + _AGAIN
            self._say("unwritten", _unwritten(self.root, error))
            return False
        self._names.add(name)
        if block.kind == END:
            self._ends.setdefault(block.parent, set()).add(_end_of(name)[1])
        return True

    def read(self, key: bytes, out: np.ndarray) -> Block | None:
        """A page: its payload into `out`, uint8 [nbytes], whole.

        None: it is not there any more, or not what was written; then it is gone now. `out` may
        hold anything. Several threads may read at once.
        """
        return self._read(_page_name(key), key, out)

    def read_end(self, parent: bytes, tail: Tail, out: np.ndarray) -> Block | None:
        """The same of an end."""
        return self._read(_end_name(parent, tail), tail.key, out)

    def used(self, keys: Sequence[bytes], ends: Sequence[tuple[bytes, Tail]] = ()) -> None:
        """These pages, in order, and ends were of use just now."""
        now = time.time_ns()
        names = [_page_name(key) for key in keys] + [_end_name(*end) for end in ends]
        for n, name in enumerate(names):
            with contextlib.suppress(OSError):
                os.utime(self.folder / name, ns=(now, now - n * 1000))

    def _looked(self) -> bool:
        """Whether what is there of the folder can be used; nothing is made for it."""
        try:
            with contextlib.suppress(FileNotFoundError):
                for folder in (self.root, self.folder):
                    if not self._own(folder):
                        return False
        except OSError as error:
            self._say("unwritten", _unwritten(self.root, error))
            return False
        return True

    def _make(self) -> bool:
        """Make the folder and what is above it; False: it is another user's. OSError."""
        for folder in (self.root, self.folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._own(folder):
                self.usable = False
                return False
        about = self.folder / ABOUT
        if not about.exists():
            said = json.dumps(self._about, indent=1).encode()
            self._in_place(ABOUT, lambda file: os.write(file, said))
        os.utime(about)
        self._made = True
        return True

    def _own(self, folder: Path) -> bool:
        """Whether this user made a folder; where not, it is said. OSError: it is no folder."""
        if not _is_ours(folder):
            text = f"{folder} is another user's; the cache of prompts is not kept there"
            self._say("foreign", text)
            return False
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return True

    def _read(self, name: str, key: bytes, out: np.ndarray) -> Block | None:
        try:
            with opened(self.folder / name) as file:
                found = read_block(file.fileno(), out)
            if (found.fingerprint, found.key) != (self.fingerprint, key):
                raise DamagedError("it is another block")
        except FileNotFoundError:
            self._names.discard(name)
        except (DamagedError, OSError) as error:
            self._drop(name, error)
        else:
            return found
        return None

    def _in_place(self, name: str, write: Callable[[int], object]) -> None:
        """Write a file beside its place, and put it there whole."""
        try:
            with in_place(self.folder / name, private=True) as file:
                write(file.fileno())
        except PermissionError:
            if sys.platform != "win32":  # there: somebody reads that very block
                raise

    def _drop(self, name: str, error: Exception) -> None:
        self._names.discard(name)
        with contextlib.suppress(OSError):
            (self.folder / name).unlink()
        reason = error.strerror if isinstance(error, OSError) else str(error)
        text = f"a block of {self.folder} is not used ({reason}); what it held is read again"
        self._say("dropped", text)

    def _say(self, what: str, text: str) -> None:
        """A line on stderr, once for everything of that kind."""
        if what not in self._said:
            self._said.add(what)
            print(f"runtime: {text}", file=sys.stderr)


def _name(block: Block) -> str:
    if block.kind == PAGES:
        return _page_name(block.key)
    return _end_name(block.parent, Tail(len(block.tokens), block.key))


def _page_name(key: bytes) -> str:
    return f"{key.hex()}.{PAGES}"


def _end_name(parent: bytes, tail: Tail) -> str:
    return f"{parent.hex()}-{tail.tokens:02d}-{tail.key.hex()}.{END}"


def _end_of(name: str) -> tuple[bytes, Tail]:
    """The parent and the tail of which there is such a name; ValueError: it is no such name."""
    parent, count, key = name.removesuffix(f".{END}").split("-")
    return bytes.fromhex(parent), Tail(int(count), bytes.fromhex(key))


def _is_ours(folder: Path) -> bool:
    """Whether this user made a folder, where the system tells users apart."""
    return not hasattr(os, "geteuid") or folder.lstat().st_uid == os.geteuid()


def _unwritten(folder: Path, error: OSError) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    more = "; `runtime cache clear` makes room" if full else ""
    return (
        f"the cache of prompts cannot be kept in {folder} ({error.strerror}); this process keeps "
        f"its prompts in memory alone{more}"
    )
