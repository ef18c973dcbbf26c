"""Which kernels there are, and what compiling gives.

Free of numba: the simulator, the launcher and a process that reads compiled kernels need only this.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from runtime.backends.plan.catalogue import Catalogue
from runtime.backends.plan.kernel import Kernel

from .intrinsic import Declared, Entry

KERNELS = Catalogue("CUDA", f"{__package__}.kernels")


@dataclass(frozen=True)
class Compiled:
    """A kernel's code for one target.

    `name`: its entry in `code`, a cubin. `registers` per thread; `spilled`: bytes of registers
    written to memory; `stack` and `shared_nbytes` (static) in bytes.
    """

    name: str
    code: bytes
    entry: Entry
    registers: int
    spilled: int
    stack: int
    shared_nbytes: int


def declared(kernel: Kernel) -> Declared:
    """The kernel's Python function and how it is launched. BackendError: no such kernel."""
    return KERNELS.build(kernel)


def head(compiled: Compiled) -> dict[str, Any]:
    """Everything but the code, as JSON values."""
    return {name: value for name, value in asdict(compiled).items() if name != "code"}


def from_head(values: dict[str, Any], code: bytes) -> Compiled:
    """The inverse of `head`. KeyError or TypeError when values are missing or foreign."""
    arguments = tuple((name, kind) for name, kind in values["entry"]["arguments"])
    entry = Entry(**values["entry"] | {"arguments": arguments})
    return Compiled(**values | {"code": code, "entry": entry})
