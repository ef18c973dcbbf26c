"""Blocks on disk: a head of HEAD bytes that says what they are, then numbers in the plain layout.

    magic     8 bytes, with the version of this layout
    checksum  CRC-32 of all that follows, numbers included
    head      kind, fingerprint of the model, key, key of the block before, first place, token ids
    payload   what the head says, to its last byte

A block is used when every byte of it is what was written, and it is the one asked for. Nothing
else is trusted: not the name of its file, not its size, not that its writer came to an end.
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from runtime.memory.prefix_edges import KEY
from runtime.ops import PAGE

HEAD = 256  # bytes in front of the payload
PAGES, END, SESSION = "page", "end", "session"
NOT_REGULAR = "it is no regular file"
_KINDS = (PAGES, END, SESSION)
_MAGIC = b"rtblock1"
_CHECK = struct.Struct("<8sI4x")
_REST = struct.Struct(f"<{KEY}s{KEY}s{KEY}sIIQQ{PAGE}i")


class DamagedError(Exception):
    """Why a block is not used, in a few words."""


class Block(NamedTuple):
    """What a block is of: `tokens` from place `start` on, which follow the block `parent`.

    kind: "page", K and V of PAGE tokens; "end", those of fewer, and the recurrent state behind
    them where the model has one; "session", what a file of a session says about itself.
    """

    kind: str
    fingerprint: bytes
    key: bytes
    parent: bytes
    start: int
    tokens: tuple[int, ...]
    nbytes: int  # of the payload

    def head(self, payload: np.ndarray) -> bytes:
        """The bytes in front of a payload, uint8 [nbytes]."""
        ids = (*self.tokens, *(0 for _ in range(PAGE - len(self.tokens))))
        rest = _REST.pack(
            self.fingerprint, self.key, self.parent, _KINDS.index(self.kind), len(self.tokens),
            self.start, self.nbytes, *ids,
        )  # fmt: skip
        rest = rest.ljust(HEAD - _CHECK.size, b"\0")
        return _CHECK.pack(_MAGIC, zlib.crc32(payload.data, zlib.crc32(rest))) + rest


def parsed(head: bytes | bytearray) -> Block:
    """The block that a head is of; nothing is known yet of its checksum."""
    if not bytes(head[: len(_MAGIC)]) == _MAGIC or len(head) != HEAD:
        raise DamagedError("it is no such file, or of another version")
    whose, key, parent, kind, count, start, nbytes, *ids = _REST.unpack_from(head, _CHECK.size)
    if kind >= len(_KINDS) or count > PAGE:
        raise DamagedError("it is damaged")
    return Block(_KINDS[kind], whose, key, parent, start, tuple(ids[:count]), nbytes)


def opened(path: Path) -> IO[bytes]:
    """A regular file, to be read; a pipe in its place is not waited for. OSError, DamagedError."""
    return open(path, "rb", buffering=0, opener=_regular)


def read_head(path: Path) -> Block:
    """What a file says it begins with. OSError, DamagedError."""
    with opened(path) as file:
        return parsed(file.read(HEAD))


def read_block(file: int, out: np.ndarray, at: int = 0) -> Block:
    """The block at byte `at` of an open file, its payload into `out`, uint8 [nbytes], whole.

    DamagedError: it is not one of so many bytes, or not what was written. OSError.
    """
    head = bytearray(HEAD)
    if _read(file, (head, out.data), at) != HEAD + out.nbytes:
        raise DamagedError("it is cut short")
    found = parsed(head)
    if found.nbytes != out.nbytes:
        raise DamagedError(f"it has {found.nbytes} bytes, and {out.nbytes} are needed")
    checksum = zlib.crc32(out.data, zlib.crc32(memoryview(head)[_CHECK.size :]))
    if checksum != _CHECK.unpack_from(head)[1]:
        raise DamagedError("it is damaged")
    return found


def write_block(file: int, block: Block, payload: np.ndarray) -> None:
    """Write a block, uint8 payload, where an open file's position is. OSError."""
    for part in (memoryview(block.head(payload)), payload.data):
        while part:
            part = part[os.write(file, part) :]


def _regular(path: str, flags: int) -> int:
    file = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise DamagedError(NOT_REGULAR)
    return file


def _read(file: int, rooms: Sequence[bytearray | memoryview], at: int) -> int:
    """Bytes read from `at` on into rooms one after the other; fewer at the end of the file."""
    if hasattr(os, "preadv"):
        count = os.preadv(file, rooms, at)
        if count in (0, sum(map(len, rooms))):
            return count
    total = 0
    os.lseek(file, at, os.SEEK_SET)
    for room in rooms:
        done = 0
        while done < len(room) and (some := os.read(file, len(room) - done)):
            room[done : done + len(some)] = some
            done += len(some)
        total += done
    return total
