"""Which kernels there are, the constants each is specialised for, and what compiling gives.

Free of numba: the simulator, the launcher and a process that reads compiled kernels need only this.
"""

from __future__ import annotations

import importlib
import itertools
from dataclasses import dataclass
from typing import Any

from runtime.backends.plan.kernel import Kernel
from runtime.ops.errors import BackendError

from .intrinsic import Declared, Entry

_DIMS = (64, 128)  # head sizes

# file of kernels/ -> kernel -> constant -> the values it may have
_FILES: dict[str, dict[str, dict[str, tuple]]] = {
    "attention": {
        "attention": {"dim": _DIMS},
        "attention_merge": {"dim": _DIMS},
        "kv_write": {"which": ("k", "v"), "dim": _DIMS},
    },
    "argmax": {"argmax_parts": {}, "argmax_merge": {}},
    "elementwise": {"swiglu": {"packed": (False, True)}},
    "norm": {"rms_norm": {"packed": (False, True)}},
    "pack": {"quantize": {}},
    "rope": {"rope_angles": {}, "rope": {"style": ("neox", "normal")}},
    "matvec": {"matvec": {"format": ("Q8_0", "Q4_0", "Q4_K", "Q6_K"), "columns": (1, 2, 4, 8)}},
    "tile": {"tile": {"format": ("Q8_0", "Q4_0")}},
}
FILE_OF = {kernel: name for name, file in _FILES.items() for kernel in file}
CONSTANTS = {kernel: values for file in _FILES.values() for kernel, values in file.items()}


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
    check(kernel)
    module = importlib.import_module(f"{__package__}.kernels.{FILE_OF[kernel.name]}")
    return module.KERNELS[kernel.name](**dict(kernel.constants))


def every_kernel() -> list[Kernel]:
    """All kernels with all their constants: what a warm-up compiles."""
    found = []
    for name, constants in CONSTANTS.items():
        for values in itertools.product(*constants.values()):
            found.append(Kernel.of(name, **dict(zip(constants, values, strict=True))))
    return found


def check(kernel: Kernel) -> None:
    """BackendError: no such kernel, or constants it does not have."""
    if kernel.name not in CONSTANTS:
        known = ", ".join(CONSTANTS)
        raise BackendError(f"no CUDA kernel is called {kernel.name!r}; there are {known}")
    allowed, given = CONSTANTS[kernel.name], dict(kernel.constants)
    if set(given) != set(allowed):
        raise BackendError(f"kernel {kernel.name} takes constants {list(allowed)}, not {given}")
    for key, value in given.items():
        if value not in allowed[key]:
            raise BackendError(f"kernel {kernel.name}: {key} is one of {allowed[key]}, not {value}")


def head(compiled: Compiled) -> dict[str, Any]:
    """Everything but the code, as JSON values."""
    values = {k: v for k, v in vars(compiled).items() if k not in ("code", "entry")}
    return values | {"entry": compiled.entry.to_json()}


def from_head(values: dict[str, Any], code: bytes) -> Compiled:
    """The inverse of `head`. KeyError or TypeError when values are missing or foreign."""
    return Compiled(**values | {"code": code, "entry": Entry.from_json(values["entry"])})
