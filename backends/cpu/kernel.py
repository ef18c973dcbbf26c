"""The name of one compiled kernel: what it is called and the constants it is specialised for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from runtime.ops.errors import BackendError


@dataclass(frozen=True)
class Kernel:
    """`name` is a key of SIGNATURES; `constants` sorted pairs, all JSON values."""

    name: str
    constants: tuple[tuple[str, Any], ...] = ()

    @staticmethod
    def of(name: str, **constants: Any) -> Kernel:
        """The kernel `name` with these constants, in one canonical order."""
        return Kernel(name, tuple(sorted(constants.items())))

    @staticmethod
    def parse(text: str) -> Kernel:
        """The inverse of `dump`."""
        name, constants = json.loads(text)
        return Kernel.of(name, **constants)

    def dump(self) -> str:
        """One line of JSON, for the compile processes."""
        return json.dumps([self.name, dict(self.constants)])

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.constants)])


def arguments_of(name: str) -> tuple[str, ...]:
    """Names of a kernel's arguments in the order of its table."""
    from runtime.backends.cpu.signatures import SIGNATURES
    from runtime.backends.cpu.tile.spec import KERNEL_ARGS

    found = KERNEL_ARGS.get(name) or SIGNATURES.get(name)
    if found is None:
        raise BackendError(
            f"no CPU kernel is called {name!r}: list its arguments in backends/cpu/signatures.py"
        )
    return found
