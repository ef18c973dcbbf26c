"""Compiled kernels of one target; see plan/library.py.

Where the toolchain is not installed, entries that any toolchain made of this source are used:
reading needs neither numba nor the compiler.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import sys
from collections.abc import Generator
from pathlib import Path

from runtime.backends.base import Progress
from runtime.backends.plan import library as plan_library
from runtime.backends.plan.kernel import Kernel
from runtime.backends.plan.library import Head

from .catalogue import KERNELS, Compiled, from_head
from .targets import capability

# what the code of a kernel depends on besides its source; the extra `cuda` brings them
TOOLCHAIN = ("numba-cuda", "numba", "llvmlite", "nvidia-nvvm", "nvidia-nvjitlink")
_HERE = "runtime.backends.cuda"


class Library(plan_library.Library[Compiled]):
    """The kernels of one target that this process has read or compiled."""

    folder, suffix = "cuda", ".cubin"
    apart = (f"{_HERE}.catalogue", f"{_HERE}.targets")

    def __init__(self, target: str, cache: Path | None) -> None:
        """See plan/library.py. BackendError: no such target."""
        capability(target)
        super().__init__(target, cache)

    def modules(self, kernel: Kernel) -> tuple[str, ...]:
        """See plan/library.py."""
        KERNELS.check(kernel)
        return KERNELS.module(kernel.name), f"{_HERE}.compile"

    def toolchain(self) -> str:
        """See `toolchain_digest`."""
        return toolchain_digest()

    def compile_all(
        self, kernels: list[Kernel], progress: Progress | None
    ) -> Generator[tuple[Kernel, Head, bytes], None, None]:
        """See plan/library.py."""
        from . import compilers

        return compilers.compile_all(kernels, self.target, progress)

    def load(self, head: Head, code: bytes) -> Compiled:
        """See plan/library.py."""
        return from_head(head, code)


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
    from runtime.backends.environment import cache_dir

    return Library(target, cache_dir())
