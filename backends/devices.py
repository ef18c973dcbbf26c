"""The backend that a device expression names."""

from __future__ import annotations

from typing import Any

from runtime.backends.base import Backend
from runtime.ops.errors import OptionError


def open_backend(devices: str, file: Any, threads: int | None, activations: str) -> Backend:
    """The backend named by `devices`: "cpu", "reference" or "null[:N]".

    `file` is an open GGUF file; OptionError names what is known for anything else.
    """
    name, _, number = devices.strip().partition(":")
    if name == "cpu" and number in ("", "0"):
        from runtime.backends.cpu import CpuBackend

        return CpuBackend(file, threads, activations)
    if name == "reference" and not number:
        from runtime.backends.reference import ReferenceBackend

        return ReferenceBackend(file)
    if name == "null" and (not number or number.isdigit()):
        from runtime.backends.cpu.planner import Planner, options
        from runtime.backends.null import NullBackend

        return NullBackend(Planner(options(activations)), int(number or 1))
    raise OptionError(
        f"devices={devices!r} is not available: this version runs on 'cpu', 'reference' (numpy, "
        "slow and exact) or 'null' (plans only)"
    )
