"""How much of a disk the cache of prompts takes, and what goes when it is full."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from runtime.memory.block_file import END, DamagedError, read_head

ABOUT, PART = "about.json", ".part"  # what a folder is of; how unfinished files end
USUAL = 8 << 30  # bytes
_OF_FREE = 10  # and no more than this part of what is free
_ROOM = 0.9  # of the budget: what is left when blocks had to go
_LOOKS = 64  # parts of the budget: others may have written, too, after so much
_UNFINISHED = 600.0  # seconds after which nobody is at writing a block any more


class Entry(NamedTuple):
    """A file of a block, or what was left of writing one."""

    path: Path
    nbytes: int
    used: float  # as `time.time` counts


def entries(root: Path) -> Iterator[Entry]:
    """All blocks below a folder, of whatever model, and unfinished ones."""
    with contextlib.suppress(OSError):
        for folder in sorted(root.iterdir()):
            with contextlib.suppress(OSError), os.scandir(folder) as found:
                for each in found:
                    if each.name != ABOUT:
                        with contextlib.suppress(OSError):
                            stat = each.stat(follow_symlinks=False)
                            yield Entry(Path(each.path), stat.st_size, stat.st_mtime)


def largest(root: Path, asked: int | None = None) -> int:
    """Bytes that a cache may take: what is asked for, or USUAL, or a tenth of what is free.

    What it has already counts as free.
    """
    if asked is not None:
        return asked
    there = next(each for each in (root, *root.parents) if each.exists())
    free = shutil.disk_usage(there).free + sum(entry.nbytes for entry in entries(root))
    return min(USUAL, free // _OF_FREE)


class DiskBudget:
    """At most so many bytes below a folder, of all processes; what was used last stays."""

    def __init__(self, root: Path, most: int) -> None:
        self.root, self.most = root, most
        self._known = sys.maxsize  # bytes there, as of when it was last looked at
        self._since = 0  # bytes written since

    def reserve(self, nbytes: int) -> bool:
        """Make room for a block that is about to be written; False: it would not fit."""
        if nbytes > self.most:
            return False
        if self._since > self.most // _LOOKS or self._known + nbytes > self.most:
            self._look(nbytes)
        self._known += nbytes
        self._since += nbytes
        return True

    def _look(self, nbytes: int) -> None:
        found, now = [*entries(self.root)], time.time()
        left = [e for e in found if e.path.suffix == PART and now - e.used > _UNFINISHED]
        total = sum(e.nbytes for e in found) - sum(_removed(e) for e in left)
        if total + nbytes > self.most:
            for entry in _least_used_first([e for e in found if e.path.suffix != PART]):
                if total <= self.most * _ROOM - nbytes:
                    break
                total -= _removed(entry)
        self._known, self._since = total, 0


def _least_used_first(found: list[Entry]) -> list[Entry]:
    """What a block was used for is also a use of those before it; of one prompt the last go first.

    Without them it would be of no use to anybody.
    """
    last: dict[bytes, float] = {}
    placed = []
    for entry in found:
        try:
            head = read_head(entry.path)
        except (OSError, DamagedError):
            placed.append((0.0, 0, entry, b"", b""))
            continue
        placed.append((entry.used, head.start, entry, head.key, head.parent))
    placed.sort(key=lambda each: -each[1])  # the last of each prompt first
    order = []
    for used, start, entry, key, parent in placed:
        # an end stands at the place of the page that its tokens begin, and has no followers
        use = used if entry.path.suffix == f".{END}" else max(used, last.get(key, 0.0))
        last[parent] = max(last.get(parent, 0.0), use)
        order.append((use, -start, entry))
    order.sort(key=lambda each: each[:2])
    return [entry for *_, entry in order]


def _removed(entry: Entry) -> int:
    """Bytes that are free now."""
    try:
        entry.path.unlink()
    except FileNotFoundError:
        pass
    except OSError:
        return 0
    return entry.nbytes
