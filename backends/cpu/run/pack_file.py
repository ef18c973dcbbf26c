"""Files of packed weights: written once, whole or not at all, then mapped by every process.

    first page    magic, place and length of the index, SHA-256 of the index
    arrays        each from the start of a page on
    index         JSON: what the arrays belong to, and of each its name, place, length and checksum

A checksum is of some pages of an array, so that opening reads little of it: a file is told from
one that is cut short, of another version, or left half written by a system that went down, not
from one in which somebody changed a single number.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PAGE = 4096  # bytes that every system's pages are a divisor or a multiple of
_MAGIC = b"runtime packs 1\n"
_HEAD = struct.Struct("<16sQQ32s")
_LARGE = 2 << 20  # bytes of a large page; written at once and in place, the system may make one
_STAGED = 4 * _LARGE
_APART = 16 << 20  # bytes between two pages that a checksum covers
_LONGEST = 256 << 20  # bytes of an index


class UnusableError(Exception):
    """Why a file is not used, in a few words."""


class _Entry(NamedTuple):
    name: str
    start: int
    nbytes: int
    checksum: int


class PackWriter:
    """Writes a new file beside its place; `finish` puts it there, `close` gives it up.

    OSError: it cannot be written.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path, self._about = path, dict(about)
        self._part = path.with_name(f"{path.name}.{os.urandom(8).hex()}{PART}")
        self._entries: list[_Entry] = []
        self._staged, self._fill, self._at = np.zeros(_STAGED, np.uint8), PAGE, 0
        self._file = self._part.open("xb", buffering=0)

    def add(self, name: str, array: np.ndarray) -> None:
        """The bytes of an array, which is contiguous."""
        raw = array.reshape(-1).view(np.uint8)
        self._fill += -(self._at + self._fill) % PAGE  # staged bytes there are zeros
        self._entries.append(_Entry(name, self._at + self._fill, raw.nbytes, checksum(raw)))
        self._put(raw)

    def finish(self) -> None:
        """Everything is in the file, and on the disk, before it has its name."""
        about = {**self._about, "entries": self._entries}
        index = json.dumps(about).encode()
        start = self._at + self._fill
        self._put(np.frombuffer(index, np.uint8))
        self._flush(self._fill)
        head = _HEAD.pack(_MAGIC, start, len(index), hashlib.sha256(index).digest())
        self._file.seek(0)
        _write(self._file, memoryview(head))
        os.fsync(self._file.fileno())
        self._file.close()
        self._part.replace(self.path)

    def close(self) -> None:
        """End; a file that is not finished is removed."""
        self._file.close()
        with contextlib.suppress(OSError):
            self._part.unlink()

    def _put(self, raw: np.ndarray) -> None:
        """Bytes go through memory of whole large pages: the file is written in such pieces."""
        while raw.nbytes:
            n = min(raw.nbytes, _STAGED - self._fill)
            self._staged[self._fill : self._fill + n] = raw[:n]
            self._fill, raw = self._fill + n, raw[n:]
            if self._fill == _STAGED:
                self._flush(_STAGED)

    def _flush(self, nbytes: int) -> None:
        for start in range(0, nbytes, _LARGE):
            _write(self._file, self._staged[start : min(nbytes, start + _LARGE)].data)
        self._at, self._fill = self._at + nbytes, 0
        self._staged[:] = 0


PART = ".part"  # how the names of unfinished files end


def read_packs(path: Path, about: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Arrays by name, uint8 [bytes], of a mapped file that all processes have in common.

    about: what they have to belong to. sizes: which there have to be, and their bytes.
    UnusableError says what is wrong; FileNotFoundError: there is no such file.
    """
    with path.open("rb") as file:
        found = _index(file, os.fstat(file.fileno()).st_size)
        changed = [name for name, value in about.items() if found.get(name) != value]
        if changed:
            raise UnusableError(f"{changed[0]} has changed")
        entries = [_Entry(*entry) for entry in found["entries"]]
        if {entry.name: entry.nbytes for entry in entries} != dict(sizes):
            raise UnusableError("it holds other weights")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    _advise(mapped)
    whole = np.frombuffer(mapped, np.uint8)
    arrays = {e.name: whole[e.start : e.start + e.nbytes] for e in entries}
    if any(checksum(arrays[entry.name]) != entry.checksum for entry in entries):
        raise UnusableError("it is damaged")
    return arrays


def about_packs(path: Path) -> dict[str, Any]:
    """What is said of a file's arrays. UnusableError, OSError: it is none."""
    with path.open("rb") as file:
        return _index(file, os.fstat(file.fileno()).st_size)


def checksum(raw: np.ndarray) -> int:
    """Of the first page of bytes, the last one, and some between."""
    found = zlib.crc32(raw[-PAGE:].data)
    for start in range(0, raw.nbytes, _APART):
        found = zlib.crc32(raw[start : start + PAGE].data, found)
    return found


def _index(file: Any, nbytes: int) -> dict[str, Any]:
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size or not head.startswith(_MAGIC):
        raise UnusableError("it is no such file, or of another version")
    _, start, length, digest = _HEAD.unpack(head)
    if start + length != nbytes or length > _LONGEST:
        raise UnusableError("it is cut short")
    file.seek(start)
    index = file.read(length)
    if hashlib.sha256(index).digest() != digest:
        raise UnusableError("it is damaged")
    found: dict[str, Any] = json.loads(index)
    return found


def _advise(mapped: mmap.mmap) -> None:
    """Large pages where the file's system has them: a fault for 2 MiB, not for every 4 KiB."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            mapped.madvise(mmap.MADV_HUGEPAGE)


def _write(file: Any, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]
