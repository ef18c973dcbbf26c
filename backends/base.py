"""What the engine asks of a backend: memory for state, and programs made from graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from runtime.backends.plan.plan import Plan
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


class Planner(Protocol):
    """What a device would do with a graph, without the device."""

    def plan(self, graph: Graph) -> Plan:
        """The calls of a step and the memory they need."""
        ...

    def page_nbytes(self, leaf: Tensor) -> int:
        """See `Backend.page_nbytes`."""
        ...

    def distinct_sizes(self, graph: Graph, sizes: Sequence[int]) -> list[int]:
        """See `Backend.distinct_sizes`."""
        ...


class Backend(Protocol):
    """A device, or a set of devices behaving as one."""

    name: str
    threads: int

    def state(self, leaf: Tensor) -> np.ndarray:
        """Memory of a state leaf, made on first use, zero, and kept; first axis = pages or slots.

        Rows are copied to share a page's past, so everything a page holds is in its row.
        """
        ...

    def page_nbytes(self, leaf: Tensor) -> int:
        """Bytes of one page, or of one slot, of a state leaf on this device."""
        ...

    def distinct_sizes(self, graph: Graph, sizes: Sequence[int]) -> list[int]:
        """Of these numbers of tokens those whose programs use every kernel that any of them uses.

        graph: the model's step of one token.
        """
        ...

    def missing(self, graphs: Sequence[Graph]) -> int:
        """How many kernels of these graphs have yet to be compiled."""
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
