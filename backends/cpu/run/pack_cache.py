"""Packed weights kept on disk for the next process: which file, whose turn, and what is said.

A file belongs to a model's path, an instruction set, and a device's part of the weights; what it
was made from (the model file's size, time and content, the code that packs) is in it, and a file
that does not fit is written anew in its place. Nothing here is ever an error: who cannot read or
write such files packs in memory, with one line on stderr.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends.cpu.run.pack_file import (
    PART,
    PackWriter,
    UnusableError,
    about_packs,
    read_packs,
)
from runtime.backends.environment import cache_dir
from runtime.backends.plan.entries import DAY, UNUSED, last_used, mark_used
from runtime.backends.plan.fingerprint import sampled
from runtime.backends.plan.lock import is_held, locked, locked_now
from runtime.ops.errors import OptionError

FOLDER, SUFFIX, LOCK = "packed", ".packed", ".lock"
PLACES = ("folder", "beside")  # the cache folder, or the model's
_STEM = 48  # characters of a model's name in those of files
Add = Callable[[str, np.ndarray], bool]


def files_in(folder: Path) -> list[Path]:
    """Files of packed weights in a folder, and what their writers left."""
    endings = SUFFIX, f"{SUFFIX}.*{PART}", f"{SUFFIX}{LOCK}"
    return sorted(path for end in endings for path in folder.glob(f"*{end}"))


def files_of(model: Path) -> list[Path]:
    """Those of a model, which is resolved, in the cache folder and beside it.

    What is not finished, or damaged, is told by its name: of all models of that name.
    """
    found = dict.fromkeys((*files_in(cache_dir() / FOLDER), *files_in(model.parent)))
    stem = model.stem[:_STEM]

    def belongs(path: Path) -> bool:
        whose = model_of(path)
        return whose == model or (whose is None and _finished(path).stem.rpartition("-")[0] == stem)

    return [path for path in found if belongs(path)]


def model_of(path: Path) -> Path | None:
    """The model that a file has packed weights of; None: it is unfinished or damaged."""
    try:
        return Path(about_packs(path)["model"])
    except (UnusableError, OSError, ValueError, TypeError, KeyError):
        return None


def is_written(path: Path) -> bool:
    """Whether somebody is at writing an unfinished file."""
    return path.suffix != SUFFIX and is_held(_lock(_finished(path)))


def remove(path: Path) -> bool:
    """Whether it is removed: what somebody writes stays. OSError: it cannot be."""
    if path.suffix == SUFFIX:
        path.unlink()
        return True
    with locked_now(_lock(_finished(path))) as alone:
        if alone:
            path.unlink(missing_ok=True)
        return alone


def _finished(path: Path) -> Path:
    """The file that an unfinished one or a lock is to become or belongs to."""
    return path.with_name(path.name.rpartition(SUFFIX)[0] + SUFFIX)


def _lock(finished: Path) -> Path:
    return finished.with_name(f"{finished.name}{LOCK}")


class PackCache:
    """Where packed weights of one open model file are kept."""

    def __init__(self, file: Any, place: str) -> None:
        """place: one of PLACES. OptionError: another."""
        if place not in PLACES:
            raise OptionError(f"pack_cache={place!r} must be one of {', '.join(PLACES)}")
        self.model = Path(file.path).resolve()
        self._kept = place == "folder"  # files that nobody uses are removed there
        self.folder = cache_dir() / FOLDER if self._kept else self.model.parent
        self.about = {
            "the model's file": [*map(list, file.opened)], "the model": sampled(file)
        }  # fmt: skip
        self._said: set[str] = set()

    def of(self, target: str, layout: str, sizes: Mapping[str, int]) -> Packs:
        """The file of these forms of weights, with their bytes; see `WeightStore`."""
        belongs = "\n".join([str(self.model), target, *sorted(sizes)])
        name = f"{self.model.stem[:_STEM]}-{hashlib.sha256(belongs.encode()).hexdigest()[:16]}"
        about = {**self.about, "the program": layout}
        return Packs(self, self.folder / f"{name}{SUFFIX}", about, sizes)

    def say(self, text: str) -> None:
        """A line on stderr, once."""
        if text not in self._said:
            self._said.add(text)
            print(f"runtime: {text}", file=sys.stderr)

    def sweep(self) -> None:
        """Remove what nobody has used for a month, and what was left unfinished a day ago."""
        if self._kept:
            for path in files_in(self.folder):
                with contextlib.suppress(OSError):
                    age = time.time() - last_used(path.stat())
                    if age > (UNUSED if path.suffix == SUFFIX else DAY):
                        remove(path)


class Packs:
    """One file of a `PackCache`."""

    def __init__(
        self, cache: PackCache, path: Path, about: Mapping[str, Any], sizes: Mapping[str, int]
    ) -> None:
        self._cache, self.path, self._about, self._sizes = cache, path, about, sizes

    def read(self) -> dict[str, np.ndarray] | None:
        """The arrays by name, mapped; None: they have to be written first."""
        try:
            stat = self.path.stat()
            found = read_packs(self.path, self._about, self._sizes)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (UnusableError, OSError, ValueError, TypeError, KeyError) as error:
            self._cache.say(f"{self.path} is written anew: {_reason(error)}")
            return None
        mark_used(self.path, stat)
        return found

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """One process at a time; another waits, and finds what this one has written."""

        def waits() -> None:
            self._cache.say(f"another process packs these weights; waiting for {self.path}")

        with contextlib.ExitStack() as held:
            with contextlib.suppress(OSError):  # writing will say it
                held.enter_context(locked(_lock(self.path), waits))
                for left in self.path.parent.glob(f"{glob.escape(self.path.name)}.*{PART}"):
                    _remove(left)  # its writer was killed: nobody else has the lock
            yield

    @contextlib.contextmanager
    def writing(self) -> Iterator[Add]:
        """A function that takes the arrays in turn; False: one cannot be written, nor others.

        The file is there when the block ends and has been given all.
        """
        left, writer = set(self._sizes), None

        def add(name: str, array: np.ndarray) -> bool:
            with self._telling():
                assert writer is not None, "there is none where the file cannot be opened"
                writer.add(name, array)
                left.discard(name)
                return True
            return False

        with self._telling():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._cache.sweep()
            _check_room(self.path.parent, sum(self._sizes.values()))
            writer = PackWriter(self.path, {**self._about, "model": str(self._cache.model)})
        try:
            yield add if writer is not None else lambda name, array: False
            if writer is not None and not left:
                with self._telling():
                    writer.finish()
        finally:
            if writer is not None:
                writer.close()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Of what goes wrong a line is said, once."""
        try:
            yield
        except OSError as error:
            self._cache.say(
                f"packed weights cannot be kept in {self.path.parent} ({_reason(error)}); they are "
                "packed in memory, in each process"
            )


def _check_room(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OSError(errno.ENOSPC, f"{_size(nbytes)} needed, {_size(free)} free")


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def _reason(error: Exception) -> str:
    if isinstance(error, OSError | UnusableError):
        return getattr(error, "strerror", None) or str(error)
    return "it is damaged"


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
