"""The name of one compiled kernel: what it is called and the constants it is specialised for."""

from __future__ import annotations

import json
from typing import Any, NamedTuple


class Kernel(NamedTuple):
    """`name` is one that the device knows; `constants` sorted pairs, all JSON values."""

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
