"""Bytes of an open file, read into memory of our own.

Models are not mapped into memory: a map of a file that someone shortens kills the process, and one
that is overwritten changes a model that computes. Here a short file is an error, and a file that
has changed since it was opened is refused.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from runtime.missing import advice
from runtime.ops.errors import FileError

_PIECE = 16 << 20  # bytes of one call of the system: an interrupt waits no longer than for these
_READERS, _SHARE = 4, 4 << 20  # threads that read at once, and bytes that are worth one
_HEAD_STEP = 1 << 20  # bytes by which a head grows
_MOST_HEAD = 256 << 20  # ten times the largest header seen


class Source:
    """A file that is open for reading. `size`: its bytes when it was opened; `opened`: with the
    time of its last change, in nanoseconds.

    FileError, in one line, wherever the file cannot be read, is short, or has changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if path.is_dir():
                raise FileError(f"{path}: this is a folder; {_files_in(path)}")
            if not path.is_file():
                missing = f"no such file; {advice(path)}"
                what = "is not a file; check the path" if path.exists() else missing
                raise FileError(f"{path}: {what}")
            self._file = path.open("rb", buffering=0)
            self.opened = self._state()
        except (OSError, ValueError) as error:
            if isinstance(error, FileError):
                raise
            raise self._unreadable(error) from error
        self.size = self.opened[0]
        self._lock = threading.Lock()  # of the place in the file, where reading needs one
        if not self.size:
            raise FileError(f"{path}: the file is empty; download it again")

    def __reduce_ex__(self, _: object) -> Any:
        raise FileError(
            f"{self.path}: an open file cannot be copied or pickled; open it again from its path"
        )

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def read(self, start: int, out: np.ndarray) -> np.ndarray:
        """Fill `out`, uint8 and contiguous, with the bytes from `start` on; `out`.

        Much is read by several threads: one alone copies no faster than a few packing threads use
        it up.
        """
        room, readers = out.data, min(_READERS, os.cpu_count() or 1)
        share = max(_SHARE, -(-len(room) // readers))
        parts = [(start + at, room[at : at + share]) for at in range(0, len(room), share)]
        results: list[Any] = []
        helpers = [
            threading.Thread(target=self._note, args=(results, *part), daemon=True)
            for part in parts[1:]
        ]
        begun = next((n for n, helper in enumerate(helpers) if not _start(helper)), len(helpers))
        for part in (parts[0], *parts[1 + begun :]) if parts else ():
            self._note(results, *part)
        for helper in helpers[:begun]:
            helper.join()
        self._check(results)
        return out

    def _note(self, results: list[Any], start: int, room: memoryview) -> None:
        """Fill `room`; append whether there was enough, or the error."""
        at, count = 0, 1
        try:
            while at < len(room) and count:
                count = self._some(start + at, room[at : at + _PIECE])
                at += count
            results.append(at == len(room))
        except OSError as error:
            results.append(error)

    def _check(self, results: list[Any]) -> None:
        for error in results:
            if isinstance(error, OSError):
                raise self._unreadable(error) from error
        if not all(results) or self._state() != self.opened:
            raise FileError(
                f"{self.path}: the file was changed after it was opened; load it again when "
                "nothing writes to it any more"
            )

    def _some(self, start: int, room: memoryview) -> int:
        """How many bytes came; 0 at the end of the file."""
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [room], start)
        with self._lock:
            self._file.seek(start)
            return self._file.readinto(room) or 0

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns

    def _unreadable(self, error: Exception) -> FileError:
        reason = getattr(error, "strerror", None) or str(error)
        return FileError(f"{self.path}: cannot be read ({reason}); check its permissions and disk")


class Head:
    """The first bytes of a file, read as far as they are asked for and kept."""

    def __init__(self, source: Source) -> None:
        self.source = source
        # memory that is never written takes no room
        self._room = np.empty(min(source.size, _MOST_HEAD), np.uint8)
        self.loaded = self._room.data[:0]
        self.load(1)

    def load(self, end: int) -> memoryview:
        """What is loaded once bytes up to `end` are, and some more. FileError: too many."""
        have = len(self.loaded)
        if end > have:
            if end > len(self._room) and len(self._room) < self.source.size:
                raise FileError(
                    f"{self.source.path}: the header is longer than {_MOST_HEAD >> 20} MiB; "
                    "download or convert the file again"
                )
            goal = min(max(end, have + _HEAD_STEP), len(self._room))
            self.source.read(have, self._room[have:goal])
            self.loaded = self._room.data[:goal].toreadonly()
        return self.loaded


def _start(thread: threading.Thread) -> bool:
    """Start a thread; False where the system has no more."""
    try:
        thread.start()
    except RuntimeError:
        return False
    return True


def _files_in(folder: Path) -> str:
    """What to do about a folder that was given for a file."""
    names = sorted(path.name for path in folder.glob("*.gguf"))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    if not names:
        if (folder / "config.json").is_file():
            return (
                "if it is a checkpoint, 'runtime convert FOLDER OUT.gguf' makes a .gguf file of it"
            )
        return "give the path of a .gguf file"
    return f"give a file in it: {', '.join(names[:3])}{more}"
