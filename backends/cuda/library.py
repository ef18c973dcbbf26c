"""Compiled kernels of one target: from the cache on disk, or compiled by processes beside this one.

Entries belong to a digest of the kernels' source and one of the toolchain that made them. Where
the toolchain is not installed, entries that any toolchain made from this source are used: reading
needs neither numba nor the compiler. A cache that cannot be written costs time, never correctness.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from runtime.backends.cpu.kernel import Kernel
from runtime.backends.entries import write_entry

from .catalogue import Compiled, check, from_head, head
from .targets import capability

# what the code of a kernel depends on besides its source; the extra `cuda` brings them
TOOLCHAIN = ("numba-cuda", "numba", "llvmlite", "nvidia-nvvm", "nvidia-nvjitlink")
_SOURCES = (
    "kernels/*.py", "catalogue.py", "compile.py", "intrinsic.py", "intrinsics.py", "lowering.py"
)  # fmt: skip
Progress = Callable[[int, int, str], None]


class Library:
    """The kernels of one target that this process has read or compiled."""

    def __init__(self, target: str, folder: Path | None) -> None:
        """`folder`: where code is kept between processes; None keeps it in memory only.

        BackendError: no such target.
        """
        capability(target)
        self.target = target
        self.folder = folder / f"cuda-{target}-{source_digest()[:16]}" if folder else None
        self._kernels: dict[Kernel, Compiled] = {}

    def get(self, kernel: Kernel) -> Compiled:
        """A kernel, read or compiled if need be. BackendError: it cannot be compiled here."""
        self.prepare([kernel])
        return self._kernels[kernel]

    def missing(self, kernels: Iterable[Kernel]) -> list[Kernel]:
        """Those that would have to be compiled. BackendError: a kernel that is not there."""
        fresh = [k for k in dict.fromkeys(kernels) if k not in self._kernels]
        for kernel in fresh:
            check(kernel)
        return [k for k in fresh if not self._read(k)]

    def prepare(self, kernels: Iterable[Kernel], progress: Progress | None = None) -> None:
        """Have all ready, compiling what is missing; `progress(done, total, name)` while it lasts.

        BackendError: a kernel does not compile, or the toolchain is not installed.
        """
        absent = self.missing(kernels)
        if absent:
            from .compilers import compile_all

            for kernel, compiled in compile_all(absent, self.target, progress):
                self._save(kernel, compiled)
                self._kernels[kernel] = compiled

    def _read(self, kernel: Kernel) -> bool:
        for path in self._candidates(kernel):
            try:
                checksum, values, code = path.read_bytes().split(b"\n", 2)
                if hashlib.sha256(values + code).hexdigest().encode() == checksum:
                    self._kernels[kernel] = from_head(json.loads(values), code)
                    return True
            except (OSError, ValueError, KeyError, TypeError):
                continue  # absent or damaged: compiled again and replaced
        return False

    def _candidates(self, kernel: Kernel) -> list[Path]:
        """Files that may hold a kernel: this toolchain's, or anyone's when there is none."""
        if self.folder is None:
            return []
        if toolchain_digest():
            return [self._path(kernel)]
        return sorted(self.folder.glob(f"*/{kernel}.cubin"))

    def _path(self, kernel: Kernel) -> Path:
        assert self.folder is not None, "a library without a folder has no paths"
        return self.folder / toolchain_digest()[:16] / f"{kernel}.cubin"

    def _save(self, kernel: Kernel, compiled: Compiled) -> None:
        if self.folder is None:
            return
        values = json.dumps(head(compiled)).encode()
        checksum = hashlib.sha256(values + compiled.code).hexdigest().encode()
        if not write_entry(self.folder, self._path(kernel), [checksum, values, compiled.code]):
            self.folder = None


@functools.cache
def source_digest() -> str:
    """Of everything of this package that a kernel's code depends on."""
    here = Path(__file__).parent
    found = hashlib.sha256()
    for pattern in _SOURCES:
        for path in sorted(here.glob(pattern)):
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


@functools.cache
def toolchain_digest() -> str:
    """Of the versions in TOOLCHAIN and of Python; "" when one of them is not installed."""
    try:
        versions = [importlib.metadata.version(name) for name in TOOLCHAIN]
    except importlib.metadata.PackageNotFoundError:
        return ""
    return hashlib.sha256(" ".join([*versions, sys.version]).encode()).hexdigest()


@functools.cache
def library(target: str) -> Library:
    """The library of a target, with the user's cache."""
    from runtime.environment import cache_dir

    return Library(target, cache_dir())
