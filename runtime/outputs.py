"""Files that are written: refused before any work where they cannot be, there only when whole."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from runtime.ops.errors import FileError
from runtime.units import in_units

Name = str | os.PathLike[str]
_ENDS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def check_outputs(
    outputs: Iterable[Name | None], inputs: Iterable[Name | None] = (), folder: Name | None = None
) -> None:
    """FileError where files cannot be written, or would take the place of what is read.

    An output has to be no folder, to be in one that is there and can be written to, and to be
    neither an input, nor a file of the `folder` that is read, nor another output, by whatever
    names or links. None is left out, and "-" among the inputs.
    """
    inside = [] if folder is None or not Path(folder).is_dir() else Path(folder).iterdir()
    read = {_identity(path) for path in (*inputs, *inside) if path not in (None, "-")}
    written: set[Any] = set()
    for path in outputs:
        if path is None:
            continue
        try:
            found = _checked(path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            name = os.fspath(path) or "''"
            raise FileError(f"{name}: cannot be written ({reason})") from None
        if found & read:
            raise FileError(f"{path}: this is a file that is read; give another name to write to")
        if found & written:
            raise FileError(f"{path}: two files would be written there; give each its own name")
        written |= found


def check_room(path: Name, nbytes: int) -> None:
    """FileError where there is no room for a file of so many bytes."""
    free = shutil.disk_usage(Path(os.path.realpath(path)).parent).free
    if free < nbytes:
        raise FileError(
            f"{path}: the new file takes {_size(nbytes)}, {_size(free)} are free; free some space "
            "or choose another folder"
        )


@contextmanager
def appearing(path: Name) -> Iterator[BinaryIO]:
    """A file to write, which is at `path` when the block ends well; what was there stays till then.

    It is written beside it, under a name that no other writer has, and removed when the block
    fails, on an interrupt and when the process is told to end. FileError when it cannot be written.
    """
    check_outputs([path])
    if Path(path).exists() and not Path(path).is_file():  # a device, a pipe
        with _saying(path), Path(path).open("wb") as device:
            yield device
        return
    whole = Path(os.path.realpath(path))
    partial = beside(whole)
    with ending(), _saying(path, partial), in_place(whole, partial) as file:
        yield file


def beside(path: Path) -> Path:
    """Where a file is written that is to take the place of `path`: no other writer has the name."""
    return path.with_name(f"{path.name[:50]}.{os.getpid()}-{secrets.token_hex(4)}.part")


@contextmanager
def in_place(path: Path, partial: Path | None = None, private: bool = False) -> Iterator[BinaryIO]:
    """A new file, at `partial`, that takes the place of `path` when the block ends well.

    It is removed when the block fails. partial: by default `beside(path)`. private: other users
    cannot read it. OSError.
    """
    partial = beside(path) if partial is None else partial
    try:
        with open(partial, "xb", opener=_private if private else None) as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Name, text: str) -> None:
    """A file of UTF-8 text; see `appearing`."""
    with appearing(path) as file:
        file.write(text.encode())


@contextmanager
def ending() -> Iterator[None]:
    """What is to end the process (SIGTERM, SIGHUP) does it as an exit, which cleans up.

    Where nobody else listens to these, and in the main thread alone.
    """
    main = threading.current_thread() is threading.main_thread()
    caught = [s for s in _ENDS if main and signal.getsignal(s) is signal.SIG_DFL]
    for number in caught:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


@contextmanager
def _saying(path: Name, partial: Path | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.filename not in (None, os.fspath(path), os.fspath(partial or path)):
            raise  # of another file
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "; free some space or choose another folder" if full else ""
        reason = error.strerror or str(error)
        raise FileError(f"{path}: cannot be written ({reason}){hint}") from error


def _checked(path: Name) -> set[Any]:
    """What tells a file that can be written from others; OSError or ValueError: why it cannot."""
    text, given, whole = os.fspath(path), Path(path), Path(os.path.realpath(path))
    if text in ("", "-"):
        raise ValueError("give the name of a file")
    if given.is_dir() or text.endswith(("/", os.sep)):
        raise ValueError("this is a folder; give the name of a file")
    if given.exists() and not given.is_file():
        return set()
    if not whole.parent.is_dir():
        raise ValueError(f"there is no folder {given.parent}")
    for needed in (given, whole.parent):
        if needed.exists() and not os.access(needed, os.W_OK):
            raise ValueError(f"no permission to write to {needed}")
    return {str(whole), _identity(path)} - {None}


def _identity(path: Any) -> Any:
    """The same for all names of a file; None where there is none."""
    try:
        stat = Path(path).stat()
    except (OSError, ValueError):
        return None
    return stat.st_dev, stat.st_ino


def _size(nbytes: float) -> str:
    return in_units(nbytes, 1000, ("bytes", "kB", "MB", "GB", "TB"), (0, 1, 1, 2, 2))
