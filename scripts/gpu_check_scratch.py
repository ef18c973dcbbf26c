"""Folders for large files that are gone when who made them is, however that ended."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "gpu-check-"
_MEMORY = Path("/dev/shm")


def scratch(in_memory: bool = True) -> Path:
    """A new folder, in memory where there is such a place; it is removed at the exit.

    Those of processes that were killed are removed now.
    """
    base = _MEMORY if in_memory and _MEMORY.is_dir() else Path(tempfile.gettempdir())
    sweep(base)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
    _lock(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def sweep(base: Path) -> None:
    """Remove folders whose makers are dead."""
    for folder in base.glob(f"{_PREFIX}*"):
        try:
            held = _lock(folder)
        except OSError:  # its maker lives, or it is another user's
            continue
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def _lock(folder: Path) -> int:
    """Held until this process ends, or closes it. OSError: another one holds it."""
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        raise
    return held
