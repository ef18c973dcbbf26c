"""Compiled kernels of one target: from the cache on disk, or compiled by processes beside this one.

An entry belongs to a digest of what its kernel is made of, and to one of the toolchain that made
it. Where the toolchain is not installed, entries that any toolchain made of this source are used:
reading needs neither numba nor the compiler. A cache that cannot be written costs time, never
correctness.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from runtime.backends.plan.entries import Entries
from runtime.backends.plan.kernel import Kernel
from runtime.backends.plan.sources import Sources

from .catalogue import FILE_OF, Compiled, check, from_head, head
from .targets import capability

# what the code of a kernel depends on besides its source; the extra `cuda` brings them
TOOLCHAIN = ("numba-cuda", "numba", "llvmlite", "nvidia-nvvm", "nvidia-nvjitlink")
_HERE = "runtime.backends.cuda"
# Names of kernels and of targets, errors: no code is made of them.
_APART = (
    f"{_HERE}.catalogue", f"{_HERE}.targets", "runtime.backends.plan.kernel", "runtime.ops.errors"
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
        self.entries = Entries(folder)
        self._sources = Sources(self.entries, _APART)
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

            with contextlib.closing(compile_all(absent, self.target, progress)) as found:
                for kernel, compiled in found:
                    if self._sources.unchanged(*_source_modules(kernel)):
                        name = self.name(kernel, toolchain_digest())
                        self.entries.write(name, json.dumps(head(compiled)), compiled.code)
                    self._kernels[kernel] = compiled

    def name(self, kernel: Kernel, toolchain: str) -> str:
        """The name of a kernel's entry, which says all that its code depends on."""
        source = self._sources.digest(*_source_modules(kernel))[:32]
        return f"cuda-{self.target}/{kernel}-{source}-{toolchain[:16]}.cubin"

    def _read(self, kernel: Kernel) -> bool:
        for name in self._candidates(kernel):
            entry = self.entries.read(name)
            try:
                if entry is not None:
                    self._kernels[kernel] = from_head(json.loads(entry[0]), entry[1])
                    return True
            except (ValueError, KeyError, TypeError):
                continue  # what a kernel's head holds has changed: compiled again and replaced
        return False

    def _candidates(self, kernel: Kernel) -> list[str]:
        """Entries that may hold a kernel: this toolchain's, or anyone's when there is none."""
        if self.entries.folder is None:
            return []
        if toolchain_digest():
            return [self.name(kernel, toolchain_digest())]
        found = sorted(self.entries.folder.glob(self.name(kernel, "*")))
        return [path.relative_to(self.entries.folder).as_posix() for path in found]


def _source_modules(kernel: Kernel) -> tuple[str, ...]:
    """The modules a kernel is compiled from; what they import comes with them."""
    return f"{_HERE}.kernels.{FILE_OF[kernel.name]}", f"{_HERE}.compile"


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
