"""The compiled kernels of one instruction set; see plan/library.py.

Numba is only ever imported by the compile processes: a warm process loads objects with llvmlite.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from runtime.backends.base import Progress
from runtime.backends.cpu.compile import objects
from runtime.backends.cpu.kernels import KERNELS
from runtime.backends.cpu.tile.spec import TILE_KERNELS
from runtime.backends.plan import library as plan_library
from runtime.backends.plan.kernel import Kernel
from runtime.backends.plan.library import Head
from runtime.ops.errors import BackendError

_HERE = "runtime.backends.cpu"
_Word = TypeVar("_Word")


class Native(NamedTuple):
    """A kernel in memory: its entry, and the names of its arguments in the order of the table."""

    address: int
    arguments: tuple[str, ...]

    def ordered(self, kernel: Kernel, given: Mapping[str, _Word]) -> list[_Word]:
        """Arguments by name as the kernel takes them. BackendError: it takes others."""
        if given.keys() != set(self.arguments):
            wrong = sorted(given.keys() ^ set(self.arguments))
            raise BackendError(
                f"kernel {kernel.name} takes {' '.join(self.arguments)}; in backends/cpu its caller"
                f" and it do not agree about {' '.join(wrong)}"
            )
        return [given[name] for name in self.arguments]


class Library(plan_library.Library[Native]):
    """The kernels of one instruction set that this process has loaded."""

    folder, suffix = "kernels", ".o"
    # of the instruction sets `_target_values` takes what is known of the one
    apart = (f"{_HERE}.compile.isa",)

    def address(self, kernel: Kernel) -> int:
        """The entry of a kernel, loading or compiling it if need be."""
        return self.get(kernel).address

    def modules(self, kernel: Kernel) -> tuple[str, ...]:
        """See plan/library.py."""
        if kernel.name in TILE_KERNELS:
            return f"{_HERE}.tile.{TILE_KERNELS[kernel.name]}", f"{_HERE}.compile.objects"
        return KERNELS.module(kernel.name), f"{_HERE}.kernels.compile"

    def toolchain(self) -> str:
        """Of the instruction set, the system, and the versions of Python, Numba and llvmlite."""
        return toolchain(self.target)

    def compile_all(
        self, kernels: list[Kernel], progress: Progress | None
    ) -> Generator[tuple[Kernel, Head, bytes], None, None]:
        """See plan/library.py."""
        from runtime.backends.cpu.compile import compilers

        return compilers.compile_all(kernels, self.target, progress)

    def load(self, head: Head, code: bytes) -> Native:
        """See plan/library.py."""
        address = objects.load_object(code, head["symbol"], extra_symbols())
        return Native(address, tuple(head["arguments"]))


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


@functools.cache
def library(isa: str | None = None) -> Library:
    """The library of an instruction set (default: the selected one), with the user's cache."""
    from runtime.backends.cpu.compile.isa import selected
    from runtime.backends.environment import cache_dir

    return Library(isa or selected(), cache_dir())
