"""A lock between processes: a file that one of them has locked, until it ends at the latest."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_AGAIN, _PATIENCE = 0.05, 1.0  # seconds between two tries, and before a wait is told
_TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


@contextlib.contextmanager
def locked(path: Path, waits: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of that file; whoever asks meanwhile, here or elsewhere, waits for its end.

    The file goes with the lock. waits: called once if that lasts. Where the system has no such
    locks nobody waits: what is done under the lock has to be right without it. OSError: the file
    cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    begun, told = time.monotonic(), False
    while (file := _held(path)) is None:
        if not told and time.monotonic() - begun > _PATIENCE:
            told = True
            waits()
        time.sleep(_AGAIN)
    with _giving_back(path, file):
        yield


@contextlib.contextmanager
def locked_now(path: Path) -> Iterator[bool]:
    """Hold the lock of that file where nobody else does; False: somebody does. See `locked`."""
    file = _held(path)
    if file is None:
        yield False
        return
    with _giving_back(path, file):
        yield True


def is_held(path: Path) -> bool:
    """Whether somebody holds the lock of that file."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _take(file)
    finally:
        os.close(file)


@contextlib.contextmanager
def _giving_back(path: Path, file: int) -> Iterator[None]:
    """The file is removed while it is held: who waits for it sees that, and takes the next one."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(file)


def _held(path: Path) -> int | None:
    """The open file, locked; None: another has the lock, or has just removed the file."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if _take(file) and os.path.samestat(os.fstat(file), path.stat()):
            return file
    except FileNotFoundError:
        pass
    os.close(file)
    return None


def _take(file: int) -> bool:
    """Whether it is held now, or there are no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _TAKEN
    return True
