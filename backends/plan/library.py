"""Compiled kernels of one target: from the cache on disk, or compiled by processes beside this one.

An entry of the cache belongs to one digest of the source of its kernel, everything that imports
included, and to one of the toolchain that made it. A warm process only reads. A cache that cannot
be written costs time, never correctness.
"""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

from runtime.backends.base import Progress
from runtime.backends.plan.entries import Entries
from runtime.backends.plan.kernel import Kernel
from runtime.backends.plan.sources import Sources

Head = dict[str, Any]  # what is known of a kernel's code, as JSON values
Loaded = TypeVar("Loaded")
# Names of kernels, errors, and how compiled code is kept: no code is made of them.
_APART = (
    "runtime.backends.plan.catalogue", "runtime.backends.plan.kernel", "runtime.ops.errors"
)  # fmt: skip


class Library(ABC, Generic[Loaded]):
    """The kernels of one target that this process has read or compiled."""

    folder = suffix = ""  # of entries, in front of the target and at the end
    apart: Collection[str] = ()  # further modules that no code is made of

    def __init__(self, target: str, cache: Path | None) -> None:
        """`cache`: where code is kept between processes; None keeps it in memory only."""
        self.target = target
        self.entries = Entries(cache)
        self._sources = Sources(self.entries, (*_APART, *self.apart))
        self._loaded: dict[Kernel, Loaded] = {}

    @abstractmethod
    def modules(self, kernel: Kernel) -> tuple[str, ...]:
        """The modules a kernel is compiled from; what they import comes with them.

        BackendError: there is no such kernel.
        """

    @abstractmethod
    def toolchain(self) -> str:
        """A digest of what code depends on beside its source; "" where nothing can be compiled."""

    @abstractmethod
    def compile_all(
        self, kernels: list[Kernel], progress: Progress | None
    ) -> Generator[tuple[Kernel, Head, bytes], None, None]:
        """Compile in parallel processes; heads and code as they finish.

        BackendError names the kernel that failed, or what to install.
        """

    @abstractmethod
    def load(self, head: Head, code: bytes) -> Loaded:
        """Code made ready. ValueError, KeyError or TypeError: the head is of another version."""

    def get(self, kernel: Kernel) -> Loaded:
        """A kernel, read or compiled if need be. BackendError: it cannot be compiled here."""
        if kernel not in self._loaded:
            self.prepare([kernel])
        return self._loaded[kernel]

    def missing(self, kernels: Iterable[Kernel]) -> list[Kernel]:
        """Those that would have to be compiled; the others are loaded."""
        fresh = [k for k in dict.fromkeys(kernels) if k not in self._loaded]
        for kernel in fresh:
            self.modules(kernel)  # a name that nobody knows is refused first
        return [k for k in fresh if not self._read(k)]

    def prepare(self, kernels: Iterable[Kernel], progress: Progress | None = None) -> None:
        """Have all ready, compiling what is missing; `progress(done, total, name)` while it lasts.

        BackendError: a kernel does not compile, or the toolchain is not installed.
        """
        absent = self.missing(kernels)
        if not absent:
            return
        # closing: an interrupt here ends the compile processes now, not at some collection
        with contextlib.closing(self.compile_all(absent, progress)) as compiled:
            for kernel, head, code in compiled:
                if self._sources.unchanged(*self.modules(kernel)):
                    self.entries.write(self.name(kernel), json.dumps(head), code)
                self._loaded[kernel] = self.load(head, code)

    def sources(self, kernels: Iterable[Kernel], *modules: str) -> str:
        """A digest of the source of kernels and of further modules, imports included."""
        every = {name for kernel in kernels for name in self.modules(kernel)}
        return self._sources.digest(*sorted(every.union(modules)))

    def name(self, kernel: Kernel, toolchain: str | None = None) -> str:
        """The name of a kernel's entry, which says all that its code depends on."""
        source = self._sources.digest(*self.modules(kernel))[:32]
        made_by = (self.toolchain() if toolchain is None else toolchain)[:16]
        return f"{self.folder}-{self.target}/{kernel}-{source}-{made_by}{self.suffix}"

    def _read(self, kernel: Kernel) -> bool:
        for name in self._candidates(kernel):
            entry = self.entries.read(name)
            try:
                if entry is not None:
                    self._loaded[kernel] = self.load(json.loads(entry[0]), entry[1])
                    return True
            except (ValueError, KeyError, TypeError):
                continue  # what a kernel's head holds has changed: compiled again and replaced
        return False

    def _candidates(self, kernel: Kernel) -> list[str]:
        """Entries that may hold a kernel: this toolchain's, or anyone's where there is none."""
        if self.entries.folder is None:
            return []
        if self.toolchain():
            return [self.name(kernel)]
        found = sorted(self.entries.folder.glob(self.name(kernel, "*")))
        return [path.relative_to(self.entries.folder).as_posix() for path in found]
