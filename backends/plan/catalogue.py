"""What kernels a device has: read off the files that build them, declared nowhere else.

The kernel NAME is built by the function `build_NAME` of one file in the device's folder of kernels;
its parameters are the constants the kernel is specialised for, and `@constants` in front of it says
which values each may have. Which file has a kernel is read off the text, so that a process that
finds its kernels compiled imports nothing that they are written with.
"""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from runtime.backends.plan.kernel import Kernel
from runtime.backends.plan.sources import source_path
from runtime.ops.errors import BackendError

_BUILDER = re.compile(r"^def build_(\w+)\(", re.MULTILINE)
_Build = TypeVar("_Build", bound=Callable[..., Any])


def constants(
    where: Callable[..., bool] | None = None, **values: Collection[Any]
) -> Callable[[_Build], _Build]:
    """Declare the constants of what a function builds, each with the values it may have.

    where: which of their combinations there are, by default all.
    """

    def declare(build: _Build) -> _Build:
        build.constants, build.where = values, where  # type: ignore[attr-defined]
        return build

    return declare


class Catalogue:
    """The kernels of one device. device: "CPU" or "CUDA", for messages; package: of the files."""

    def __init__(self, device: str, package: str) -> None:
        self._device, self._package = device, package
        self._modules: dict[str, str] = {}

    def names(self) -> list[str]:
        """All kernels there are, file by file. BackendError: two files build one kernel."""
        if not self._modules:
            self._modules = self._found()
        return list(self._modules)

    def module(self, name: str) -> str:
        """The module that builds a kernel. BackendError: none does."""
        if name not in self.names():
            raise BackendError(
                f"no {self._device} kernel is called {name!r}: write build_{name} in a file of "
                f"{self._folder()}; there are {', '.join(sorted(self._modules))}"
            )
        return self._modules[name]

    def constants(self, name: str) -> dict[str, Collection[Any]]:
        """The constants of a kernel and the values each may have; imports its file."""
        return getattr(self._builder(name), "constants", {})

    def every(self) -> list[Kernel]:
        """All kernels with all their constants."""
        found = []
        for name in self.names():
            allowed = self.constants(name)
            for values in itertools.product(*allowed.values()):
                given = dict(zip(allowed, values, strict=True))
                if self._has(name, given):
                    found.append(Kernel.of(name, **given))
        return found

    def check(self, kernel: Kernel) -> None:
        """BackendError: no such kernel, or constants it does not have."""
        allowed, given = self.constants(kernel.name), dict(kernel.constants)
        if set(given) != set(allowed):
            raise BackendError(f"kernel {kernel.name} takes constants {list(allowed)}, not {given}")
        for key, value in given.items():
            if value not in allowed[key]:
                raise BackendError(
                    f"kernel {kernel.name}: {key} is one of {tuple(allowed[key])}, not {value!r}"
                )

        if not self._has(kernel.name, given):
            raise BackendError(f"kernel {kernel.name} is not made for {given}")

    def build(self, kernel: Kernel) -> Any:
        """What `build_NAME` gives for these constants. BackendError as `check`."""
        self.check(kernel)
        return self._builder(kernel.name)(**dict(kernel.constants))

    def _has(self, name: str, given: dict[str, Any]) -> bool:
        where = getattr(self._builder(name), "where", None)
        return where is None or where(**given)

    def _builder(self, name: str) -> Callable[..., Any]:
        return getattr(importlib.import_module(self.module(name)), f"build_{name}")

    def _folder(self) -> str:
        return self._package.removeprefix("runtime.").replace(".", "/")

    def _found(self) -> dict[str, str]:
        path, found = source_path(self._package), dict[str, str]()
        assert path is not None, f"{self._package} is a package of kernels"
        for file in sorted(path.parent.glob("*.py")):
            for name in _BUILDER.findall(file.read_text("utf-8")):
                if name in found:
                    raise BackendError(
                        f"{self._device} kernel {name!r} is built in {file.stem}.py and in "
                        f"{found[name].rpartition('.')[2]}.py of {self._folder()}"
                    )
                found[name] = f"{self._package}.{file.stem}"
        return found
