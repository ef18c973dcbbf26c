"""Compiled kernels: from the cache on disk, or compiled by parallel processes on first use.

A cache folder belongs to one digest of everything the object code depends on: the kernels' source,
the instruction set, and the versions of Numba and llvmlite. A warm process reads objects and loads
them with llvmlite; Numba is only ever imported by the compile processes. A cache that cannot be
written costs time, never correctness.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from runtime.backends.cpu import objects
from runtime.backends.cpu.kernel import Kernel
from runtime.backends.cpu.signatures import FILE_OF
from runtime.backends.entries import write_entry

_SOURCES = ("kernels/*.py", "tile/*.py", "isa.py", "objects.py", "signatures.py")
Progress = Callable[[int, int, str], None]


class Library:
    """The kernels of one instruction set that this process has loaded."""

    def __init__(self, isa: str, folder: Path | None) -> None:
        """`folder`: where object code is kept between processes; None keeps it in memory only."""
        self.isa = isa
        self.folder = folder / f"kernels-{isa}-{digest(isa)[:16]}" if folder else None
        self._addresses: dict[Kernel, int] = {}

    def address(self, kernel: Kernel) -> int:
        """The entry of a kernel, loading or compiling it if need be."""
        if kernel not in self._addresses:
            self.prepare([kernel])
        return self._addresses[kernel]

    def missing(self, kernels: Iterable[Kernel]) -> list[Kernel]:
        """Those that are neither loaded nor on disk."""
        fresh = [k for k in dict.fromkeys(kernels) if k not in self._addresses]
        return [k for k in fresh if self.folder is None or not self._path(k).is_file()]

    def prepare(self, kernels: Iterable[Kernel], progress: Progress | None = None) -> None:
        """Load all, compiling what is missing; `progress(done, total, name)` while it lasts."""
        wanted = [k for k in dict.fromkeys(kernels) if k not in self._addresses]
        absent = [k for k in wanted if not self._load_from_disk(k)]
        if absent:
            from runtime.backends.cpu.compilers import compile_all

            for kernel, symbol, code in compile_all(absent, self.isa, progress):
                self._save(kernel, symbol, code)
                self._load(kernel, symbol, code)

    def _load_from_disk(self, kernel: Kernel) -> bool:
        if self.folder is None:
            return False
        try:
            data = self._path(kernel).read_bytes()
            checksum, symbol, code = data.split(b"\n", 2)
        except (OSError, ValueError):
            return False
        if hashlib.sha256(code).hexdigest().encode() != checksum:
            return False  # a damaged entry is compiled again and replaced
        self._load(kernel, symbol.decode(), code)
        return True

    def _load(self, kernel: Kernel, symbol: str, code: bytes) -> None:
        self._addresses[kernel] = objects.load_object(code, symbol, extra_symbols())

    def _save(self, kernel: Kernel, symbol: str, code: bytes) -> None:
        if self.folder is None:
            return
        checksum = hashlib.sha256(code).hexdigest().encode()
        if not write_entry(self.folder, self._path(kernel), [checksum, symbol.encode(), code]):
            self.folder = None

    def _path(self, kernel: Kernel) -> Path:
        assert self.folder is not None, "a library without a folder has no paths"
        return self.folder / f"{kernel}.o"


@functools.cache
def extra_symbols() -> dict[str, int]:
    """What Numba's wrapper refers to on its error path, which kernels never take."""
    import ctypes

    nothing = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda p: None)
    _kept.append(nothing)
    address = ctypes.cast(nothing, ctypes.c_void_p).value or 0
    return dict.fromkeys(("numba_gil_ensure", "numba_gil_release"), address)


_kept: list[Any] = []


@functools.cache
def digest(isa: str) -> str:
    """Of everything compiled code depends on."""
    from runtime.backends.cpu.isa import target

    here = Path(__file__).parent
    found = hashlib.sha256(f"{target(isa)} {sys.platform} {sys.version_info[:2]}".encode())
    for pattern in _SOURCES:
        for path in sorted(here.glob(pattern)):
            found.update(path.name.encode() + path.read_bytes())
    for package in ("numba", "llvmlite"):
        found.update(_version_source(package))
    return found.hexdigest()


def _version_source(package: str) -> bytes:
    """The package's version file, read without importing the package."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / "_version.py" if spec and spec.origin else None
    return path.read_bytes() if path and path.is_file() else b""


def is_numba(kernel: Kernel) -> bool:
    """Whether Numba compiles it; the tile emitter's kernels need llvmlite alone."""
    return kernel.name in FILE_OF


@functools.cache
def library(isa: str | None = None) -> Library:
    """The library of an instruction set (default: the selected one), with the user's cache."""
    from runtime.backends.cpu.isa import selected
    from runtime.environment import cache_dir

    return Library(isa or selected(), cache_dir())
