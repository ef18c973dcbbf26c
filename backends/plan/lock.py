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

    waits: called once if that lasts. Where the system has no such locks nobody waits: what is done
    under the lock has to be right without it. OSError: the file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        begun, told = time.monotonic(), False
        while not _take(file):
            if not told and time.monotonic() - begun > _PATIENCE:
                told = True
                waits()
            time.sleep(_AGAIN)
        yield
    finally:
        os.close(file)  # which gives it back


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
