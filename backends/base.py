"""What the engine asks of a backend: memory for state, and programs made from graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from runtime.ops.errors import OptionError
from runtime.ops.graph import Graph
from runtime.ops.tensor import Tensor

Progress = Callable[[int, int, str], None]  # done, total, what


class Program(Protocol):
    """A graph made ready for one device."""

    def run(
        self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]
    ) -> Sequence[np.ndarray]:
        """One step: int32 inputs by name (live part only), live counts; the graph's outputs.

        Results are views of the device's memory, valid until the next run.
        """
        ...


class Backend(Protocol):
    """A device, or a set of devices behaving as one."""

    name: str

    def state(self, leaf: Tensor) -> np.ndarray:
        """Memory of a state leaf, made on first use, zero, and kept; first axis = pages or slots.

        Rows are copied to share a page's past, so everything a page holds is in its row.
        """
        ...

    def state_page_nbytes(self, leaf: Tensor) -> int:
        """Bytes of one page, or of one slot, of a state leaf on this device."""
        ...

    def program(self, graph: Graph) -> Program:
        """The program of a graph; equal graphs give the same program."""
        ...

    def load(self, graphs: Sequence[Graph], progress: Progress | None = None) -> None:
        """Make weights and kernels of these graphs ready, before the first token."""
        ...

    def close(self) -> None:
        """End threads and free memory; further calls are errors."""
        ...


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
        from runtime.backends.null import NullBackend

        return NullBackend(file, int(number or 1), activations)
    raise OptionError(
        f"devices={devices!r} is not available: this version runs on 'cpu', 'reference' (numpy, "
        "slow and exact) or 'null' (plans only)"
    )
