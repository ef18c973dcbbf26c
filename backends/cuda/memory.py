"""Memory as the simulator sees it: every access in bounds and aligned, every race found.

Global memory is numpy arrays. Shared memory remembers for each word who wrote and who read it
last, and when: two threads that touch a word, one of them writing, must be separated by a barrier
(of the block, or of the warp when they share one). Whatever order the threads ran in, a missing
barrier is an error.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.ops.errors import BackendError

from .intrinsic import WIDTH
from .lanes import WARP, Lane, current

_DTYPES = {name: np.dtype(f"{name[0]}{nbytes}") for name, nbytes in WIDTH.items()}
_NOBODY, _SEVERAL = -1, -2


def python_value(kind: str, raw: np.ndarray) -> Any:
    """The first element of `raw` bytes as a kernel sees it: int, or float32."""
    value = raw.view(_DTYPES[kind])[0]
    return value if kind == "f32" else int(value)


def raw_bytes(kind: str, value: Any) -> np.ndarray:
    """A value as it lies in memory; integers wrap."""
    if kind == "f32":
        return np.array([value], np.float32).view(np.uint8)
    bits = int(value) & (1 << 8 * WIDTH[kind]) - 1
    return np.frombuffer(bits.to_bytes(WIDTH[kind], "little"), np.uint8)


class Pointer:
    """A kernel's pointer argument: an array of one type, checked at every access."""

    def __init__(self, array: np.ndarray, kind: str, name: str = "memory") -> None:
        """`array` C-contiguous; it is viewed as elements of `kind` whatever its own type."""
        if not array.flags.c_contiguous:
            raise BackendError(f"{name}: a kernel's array must be contiguous")
        self.raw = array.reshape(-1).view(np.uint8)
        self.kind, self.name = kind, name
        self.writable = array.flags.writeable

    def read(self, index: int, count: int = 1) -> tuple[Any, ...]:
        """`count` elements beginning at `index` x `count`: one aligned access."""
        start, stop = self._span(int(index), count)
        values = self.raw[start:stop].view(_DTYPES[self.kind])
        return tuple(values) if self.kind == "f32" else tuple(int(v) for v in values)

    def write(self, index: int, values: tuple[Any, ...]) -> None:
        """The inverse of `read`."""
        start, stop = self._span(int(index), len(values))
        if not self.writable:
            raise BackendError(f"{current()} writes {self.name}, which is read only")
        self.raw[start:stop] = np.concatenate([raw_bytes(self.kind, v) for v in values])

    def piece(self, index: int) -> np.ndarray:
        """The 16 bytes at `index` x 16."""
        start = int(index) * 16
        if not 0 <= start <= len(self.raw) - 16:
            raise BackendError(f"{current()} copies {self.name} at byte {start} of {len(self.raw)}")
        return self.raw[start : start + 16]

    def _span(self, index: int, count: int) -> tuple[int, int]:
        size = WIDTH[self.kind] * count
        if not 0 <= index * size <= len(self.raw) - size:
            raise BackendError(
                f"{current()} touches {self.name}[{index * count}:{(index + 1) * count}] of "
                f"{len(self.raw) // WIDTH[self.kind]} {self.kind}"
            )
        return index * size, (index + 1) * size


class _Word:
    """Who used 4 bytes of shared memory last, and when: barriers of the block and of the warp."""

    __slots__ = ("read_time", "reader", "reader_warp", "writer", "written_time")

    def __init__(self) -> None:
        self.writer = self.reader = self.reader_warp = _NOBODY
        self.written_time = self.read_time = (-1, -1)


class SharedMemory:
    """A block's shared memory, with the history of every word of 4 bytes."""

    def __init__(self, nbytes: int) -> None:
        self.data = np.full(nbytes, 0xCD, np.uint8)
        self.top = 0
        self.arrays: dict[int, int] = {}  # identity of an array -> where it lies
        self.words: dict[int, _Word] = {}  # those that were written

    def reserve(self, nbytes: int, alignment: int) -> int:
        """The address of new memory. BackendError when it is used up."""
        start = -(-self.top // alignment) * alignment
        if start + nbytes > len(self.data):
            raise BackendError(f"the block wants {start + nbytes} bytes of {len(self.data)} shared")
        self.top = start + nbytes
        return start

    def read(self, lane: Lane, start: int, size: int) -> np.ndarray:
        """`size` bytes at `start`, an address that is a multiple of `size`."""
        self._check_place(lane, start, size)
        now = (lane.block.epoch, lane.block.epochs[lane.warp])
        for address in range(start, start + size, 4):
            word = self.words.get(address)
            if word is None:
                raise BackendError(f"{lane} reads shared memory at {address} that nobody wrote")
            writer = word.writer
            if writer != lane.thread and not _ordered(word.written_time, writer // WARP, lane, now):
                raise _race(lane, "reads", address, writer)
            _remember_reader(word, lane, now)
        return self.data[start : start + size]

    def write(self, lane: Lane, start: int, raw: np.ndarray) -> None:
        """Store `raw` at `start`, an address that is a multiple of its size."""
        self._check_place(lane, start, len(raw))
        now = (lane.block.epoch, lane.block.epochs[lane.warp])
        for address in range(start, start + len(raw), 4):
            word = self.words.get(address)
            if word is None:
                word = self.words[address] = _Word()
            users = (
                (word.writer, word.writer // WARP, word.written_time),
                (word.reader, word.reader_warp, word.read_time),
            )
            for user, warp, when in users:
                if user not in (_NOBODY, lane.thread) and not _ordered(when, warp, lane, now):
                    raise _race(lane, "writes", address, user)
            word.writer, word.written_time = lane.thread, now
        self.data[start : start + len(raw)] = raw

    def _check_place(self, lane: Lane, start: int, size: int) -> None:
        if start % size or not 0 <= start <= self.top - size:
            raise BackendError(
                f"{lane} touches {size} bytes of shared memory at {start}: misaligned, or outside"
            )


def _ordered(when: tuple[int, int], warp: int, lane: Lane, now: tuple[int, int]) -> bool:
    """Whether a barrier lies between a use of `warp` at `when` and `lane` now."""
    return when[0] < now[0] or (warp == lane.warp and when[1] < now[1])


def _remember_reader(word: _Word, lane: Lane, now: tuple[int, int]) -> None:
    """Readers that no barrier separates: this lane, or several, of this warp or of several."""
    if word.reader == _NOBODY or _ordered(word.read_time, word.reader_warp, lane, now):
        word.reader, word.reader_warp = lane.thread, lane.warp
    elif word.reader != lane.thread:
        word.reader = _SEVERAL
        word.reader_warp = lane.warp if word.reader_warp == lane.warp else _SEVERAL
    word.read_time = now


def _race(lane: Lane, verb: str, address: int, other: int) -> BackendError:
    name = f"thread {other}" if other >= 0 else "other threads"
    return BackendError(
        f"{lane} {verb} shared memory at {address} that {name} used since the last barrier: "
        "a barrier is missing"
    )


class SharedArray:
    """An array in shared memory as a lane of a simulated block sees it."""

    def __init__(self, memory: SharedMemory, start: int, kind: str, count: int) -> None:
        if WIDTH[kind] != 4:
            raise BackendError(f"shared arrays have elements of 4 bytes, not {kind}")
        self.memory, self.start, self.kind, self.count = memory, start, kind, count

    def __getitem__(self, index: int) -> Any:
        return self.read(index)[0]

    def __setitem__(self, index: int, value: Any) -> None:
        self.write(index, (value,))

    def read(self, index: int, count: int = 1) -> tuple[Any, ...]:
        """`count` elements beginning at `index` x `count`: one access."""
        size = WIDTH[self.kind] * count
        start = self._address(index, count)
        values = self.memory.read(current(), start, size).view(_DTYPES[self.kind])
        return tuple(values) if self.kind == "f32" else tuple(int(v) for v in values)

    def write(self, index: int, values: tuple[Any, ...]) -> None:
        """The inverse of `read`."""
        raw = np.concatenate([raw_bytes(self.kind, v) for v in values])
        self.memory.write(current(), self._address(index, len(values)), raw)

    def _address(self, index: int, count: int) -> int:
        if not 0 <= int(index) * count <= self.count - count:
            raise BackendError(f"{current()}: index {index} of a shared array of {self.count}")
        return self.start + int(index) * count * WIDTH[self.kind]


class Registers:
    """A lane's own small array; reading what was never set is an error."""

    def __init__(self, kind: str, count: int) -> None:
        self.kind, self.values = kind, [None] * count

    def __getitem__(self, index: int) -> Any:
        value = self.values[self._index(index)]
        if value is None:
            raise BackendError(f"{current()} reads register {index}, which was never set")
        return value

    def __setitem__(self, index: int, value: Any) -> None:
        kind = self.kind
        self.values[self._index(index)] = python_value(kind, raw_bytes(kind, value))

    def _index(self, index: int) -> int:
        if not 0 <= index < len(self.values):
            raise BackendError(f"{current()}: register {index} of {len(self.values)}")
        return int(index)
