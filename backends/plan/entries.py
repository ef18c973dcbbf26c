"""Entries of the kernel caches on disk: written whole or not at all, never taken for another.

An entry is a file of four parts: a checksum of the others, the entry's name, a head of one line,
and the code. The checksum covers every byte after it; the name is the path inside the cache, so a
file that was copied or renamed onto another is as good as damaged.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import time
from pathlib import Path

DAY = 24 * 3600
UNUSED = 30 * DAY  # seconds after which an entry is removed that nobody has read
_FOLDERS = re.compile(r"(kernels|cuda)-\w+(-[0-9a-f]{16})?")
_OLD_FOLDERS = re.compile(r"(kernels|cuda)-\w+-[0-9a-f]{16}")  # one for each version
_ENTRY = re.compile(rb"[0-9a-f]{64}\n")  # how each entry of this and of older versions begins
_CODE, _UNFINISHED = (".o", ".cubin"), ".tmp"


class Entries:
    """The entries below one folder; None: nothing is kept, nothing is found.

    A folder that cannot be written costs one line on stderr and time, never correctness.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._swept = False

    def path(self, name: str) -> Path:
        """The file of an entry."""
        assert self.folder is not None, "entries without a folder have no paths"
        return self.folder / name

    def read(self, name: str) -> tuple[str, bytes] | None:
        """Head and code of the entry `name`; None when it is absent, damaged or another's."""
        if self.folder is None:
            return None
        try:
            with self.path(name).open("rb") as file:
                stat = os.fstat(file.fileno())  # before reading may change it
                checksum, rest = file.read().split(b"\n", 1)
            if hashlib.sha256(rest).hexdigest().encode() != checksum:
                return None
            stored, head, code = rest.split(b"\n", 2)
        except (OSError, ValueError):
            return None
        if stored != name.encode():
            return None
        mark_used(self.path(name), stat)
        return head.decode(), code

    def write(self, name: str, head: str, code: bytes) -> None:
        """Keep an entry; other processes see the old file or the new one."""
        if self.folder is None:
            return
        rest = b"\n".join([name.encode(), head.encode(), code])
        try:
            replace(self.path(name), hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest)
        except OSError as error:
            print(
                f"runtime: cannot write the kernel cache {self.folder} ({error.strerror}); "
                "kernels are compiled again in each process",
                file=sys.stderr,
            )
            self.folder = None
            return
        if not self._swept:
            self._swept = True
            sweep(self.folder)


def replace(path: Path, content: bytes) -> None:
    """Write beside, then rename. No two writers share a name: threads, processes, machines.

    OSError: it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.urandom(8).hex()}{_UNFINISHED}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # Windows: a file that another process reads just now stays; what is in it is as good.
        if not (sys.platform == "win32" and isinstance(error, PermissionError) and path.is_file()):
            raise


def last_used(stat: os.stat_result) -> float:
    """When a file was read or written last, as `time.time` counts; see `mark_used`."""
    return max(stat.st_atime, stat.st_mtime)


def mark_used(path: Path, stat: os.stat_result) -> None:
    """Once a day: many systems do not note when a file was read. stat: before it was read."""
    if last_used(stat) < time.time() - DAY:
        with contextlib.suppress(OSError):
            os.utime(path)


def sweep(cache: Path) -> None:
    """Remove what nobody has used for long, of whatever version; files of others stay.

    Another version that still runs loses nothing it has used in the last weeks.
    """
    with contextlib.suppress(OSError):
        for folder in cache.iterdir():
            if _FOLDERS.fullmatch(folder.name) and not folder.is_symlink():
                for path in sorted(folder.rglob("*"), reverse=True):  # files before their folder
                    _remove_unused(path)
                if _OLD_FOLDERS.fullmatch(folder.name):
                    _remove_empty(folder)


def _remove_unused(path: Path) -> None:
    with contextlib.suppress(OSError):
        stat = path.stat()  # before it is opened: that may count as a use
        age = time.time() - last_used(stat)
        if path.suffix == _UNFINISHED:  # left by a writer that was killed
            if age > DAY:
                path.unlink()
        elif path.suffix in _CODE and age > UNUSED and _is_entry(path):
            path.unlink()


def _remove_empty(folder: Path) -> None:
    for path in (*(p for p in folder.iterdir() if p.is_dir()), folder):
        with contextlib.suppress(OSError):
            path.rmdir()


def _is_entry(path: Path) -> bool:
    with path.open("rb") as file:
        return _ENTRY.fullmatch(file.read(65)) is not None
