"""Arrays of strings that stay bytes until they are asked for.

A vocabulary is some 300,000 length-prefixed strings. Opening a file only walks their lengths;
text is decoded on demand, one string at a time or all at once.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np

from .source import Head

PREFIX = 8  # bytes of the length in front of every string
_read_length = struct.Struct("<Q").unpack_from
_SEPARATORS = b"\x00\x01\x1e\x1f\n"


def scan_strings(head: Head, start: int, count: int) -> tuple[np.ndarray, int]:
    """Walk `count` strings from byte `start`: (int64 [count] positions of their prefixes, end).

    The end may lie past the file for the last string. struct.error or OverflowError when a
    prefix would.
    """
    starts = array("q")
    position, size = start, head.source.size
    while True:
        try:
            position = _scan(head.loaded, starts, position, count)
            break
        except struct.error:  # a prefix past what is loaded
            position = int(starts.pop())
            if position + PREFIX > size:
                raise
            head.load(position + PREFIX)
    return np.frombuffer(starts, np.int64) if count else np.empty(0, np.int64), position


def _scan(buffer: memoryview, starts: array[int], position: int, count: int) -> int:
    """Append positions of prefixes until there are `count`; where the last string ends."""
    add, read = starts.append, _read_length
    for _ in range(count - len(starts)):
        add(position)
        position += PREFIX + read(buffer, position)[0]
    return position


class StringArray(Sequence[str]):
    """A read-only sequence of the strings between two places of a file's head.

    Bytes that are not UTF-8 become lone surrogates (`surrogateescape`), so no string is lost;
    `raw(i)` gives the bytes as they are.
    """

    __slots__ = ("_buffer", "_ends", "_starts")

    def __init__(self, buffer: memoryview, prefixes: np.ndarray, end: int) -> None:
        self._buffer = buffer
        self._starts = prefixes + PREFIX
        self._ends = np.append(prefixes[1:], end) if len(prefixes) else prefixes

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.raw(index).decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return iter(self.tolist())

    def raw(self, index: int) -> bytes:
        """The bytes of one string; IndexError past the end."""
        return bytes(self._buffer[int(self._starts[index]) : int(self._ends[index])])

    def tolist(self) -> list[str]:
        """All strings at once, ten times faster than one by one.

        The prefixes are turned into a separator byte that no string holds, so decoding and
        splitting are two calls for the whole array.
        """
        if not len(self):
            return []
        begin, end = int(self._starts[0]) - PREFIX, int(self._ends[-1])
        region = np.frombuffer(self._buffer[begin:end], np.uint8)
        prefixes = self._starts - (begin + PREFIX)
        keep = np.ones(len(region), bool)
        for offset in range(PREFIX - 1):
            keep[prefixes + offset] = False
        text = region.copy()
        for separator in _SEPARATORS:
            text[prefixes + PREFIX - 1] = separator
            joined = text[keep].tobytes()
            if joined.count(separator) == len(self):
                return joined.decode("utf-8", "surrogateescape").split(chr(separator))[1:]
        return [self[i] for i in range(len(self))]

    def __repr__(self) -> str:
        return f"<StringArray of {len(self)}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled with its own part of the head alone."""
        begin, end = (self._starts[0] - PREFIX, self._ends[-1]) if len(self) else (0, 0)
        return _from_bytes, (bytes(self._buffer[begin:end]), self._starts - PREFIX - begin)


def _from_bytes(region: bytes, prefixes: np.ndarray) -> StringArray:
    return StringArray(memoryview(region), prefixes, len(region))
