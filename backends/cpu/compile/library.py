"""Compiled kernels: from the cache on disk, or compiled by parallel processes on first use.

An entry of the cache belongs to one digest of everything its object code depends on: the source of
that kernel and what it imports, the instruction set, and the versions of Python, Numba and
llvmlite. A warm process reads objects and loads them with llvmlite; Numba is only ever imported by
the compile processes. A cache that cannot be written costs time, never correctness.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from runtime.backends.cpu.compile import objects
from runtime.backends.cpu.signatures import FILE_OF
from runtime.backends.plan.entries import Entries
from runtime.backends.plan.kernel import Kernel
from runtime.backends.plan.sources import Sources

_HERE = "runtime.backends.cpu"
# Not part of what code is made of: names of kernels, errors, and the instruction sets, of which
# `_target_values` takes what is known of the one.
_APART = (f"{_HERE}.signatures", f"{_HERE}.compile.isa", "runtime.ops.errors")
Progress = Callable[[int, int, str], None]


class Library:
    """The kernels of one instruction set that this process has loaded."""

    def __init__(self, isa: str, folder: Path | None) -> None:
        """`folder`: where object code is kept between processes; None keeps it in memory only."""
        self.isa = isa
        self.entries = Entries(folder)
        self._sources = Sources(self.entries, _APART)
        self._addresses: dict[Kernel, int] = {}

    def address(self, kernel: Kernel) -> int:
        """The entry of a kernel, loading or compiling it if need be."""
        if kernel not in self._addresses:
            self.prepare([kernel])
        return self._addresses[kernel]

    def missing(self, kernels: Iterable[Kernel]) -> list[Kernel]:
        """Those that would have to be compiled; the others are loaded."""
        wanted = [k for k in dict.fromkeys(kernels) if k not in self._addresses]
        return [k for k in wanted if not self._load_from_disk(k)]

    def prepare(self, kernels: Iterable[Kernel], progress: Progress | None = None) -> None:
        """Load all, compiling what is missing; `progress(done, total, name)` while it lasts."""
        absent = self.missing(kernels)
        if absent:
            from runtime.backends.cpu.compile.compilers import compile_all

            # closing: an interrupt here ends the compile processes now, not at some collection
            with contextlib.closing(compile_all(absent, self.isa, progress)) as compiled:
                for kernel, symbol, code in compiled:
                    if self._sources.unchanged(*source_modules(kernel)):
                        self.entries.write(self.name(kernel), symbol, code)
                    self._load(kernel, symbol, code)

    def name(self, kernel: Kernel) -> str:
        """The name of a kernel's entry, which says all that its code depends on."""
        made_of = f"{toolchain(self.isa)} {self._sources.digest(*source_modules(kernel))}"
        return f"kernels-{self.isa}/{kernel}-{hashlib.sha256(made_of.encode()).hexdigest()[:32]}.o"

    def _load_from_disk(self, kernel: Kernel) -> bool:
        entry = self.entries.read(self.name(kernel)) if self.entries.folder else None
        if entry is not None:
            self._load(kernel, *entry)
        return entry is not None

    def _load(self, kernel: Kernel, symbol: str, code: bytes) -> None:
        self._addresses[kernel] = objects.load_object(code, symbol, extra_symbols())


def source_modules(kernel: Kernel) -> tuple[str, ...]:
    """The modules a kernel is compiled from; what they import comes with them."""
    if is_numba(kernel):
        return f"{_HERE}.kernels.{FILE_OF[kernel.name]}", f"{_HERE}.kernels.compile"
    return (
        f"{_HERE}.tile.{'pack' if kernel.name == 'pack_weights' else 'emit'}",
        f"{_HERE}.compile.objects",
    )


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
def toolchain(isa: str) -> str:
    """A digest of what code depends on beside its source: the target and the compilers."""
    found = hashlib.sha256(f"{_target_values(isa)} {sys.platform} {sys.version_info[:2]}".encode())
    for package in ("numba", "llvmlite"):
        found.update(_version_source(package))
    return found.hexdigest()


def _target_values(name: str) -> list[Any]:
    """All that emitters can ask of an instruction set."""
    from runtime.backends.cpu.compile.isa import host_arch, isa, target

    known = isa(name)
    asked = {key: getattr(known, key) for key in dir(known) if not key.startswith("_")}
    values = {key: value for key, value in asked.items() if not callable(value)}
    return [target(name), host_arch(), {**values, "needs": sorted(known.needs)}]


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
    from runtime.backends.cpu.compile.isa import selected
    from runtime.environment import cache_dir

    return Library(isa or selected(), cache_dir())
