"""The null backend: plans everything and runs nothing, as any number of devices.

For planning, memory figures and tests of whatever surrounds a model, an 80B graph included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtime.backends.base import Progress
from runtime.backends.cpu.attention import page_nbytes
from runtime.backends.cpu.lower import lower
from runtime.backends.cpu.plan import Plan
from runtime.backends.cpu.rewrite import Options, distinct_sizes
from runtime.ops.graph import Graph
from runtime.ops.tensor import Tensor


class NullBackend:
    """See backends/base.py; results are zeros, of the shapes a device would give."""

    def __init__(self, file: Any = None, devices: int = 1, activations: str = "int8") -> None:
        self.name = f"null ({devices} device{'s' * (devices != 1)})"
        self.device_count = devices
        self.options = Options(activations)

    def state(self, leaf: Tensor) -> np.ndarray:
        """Pages of no bytes: block tables work, nothing is stored."""
        return np.zeros((int(leaf.shape[0]), 0), np.uint8)

    def state_page_nbytes(self, leaf: Tensor) -> int:
        """What a page would take on the CPU."""
        return page_nbytes(leaf)

    def plan(self, graph: Graph) -> Plan:
        """The CPU's plan of a graph."""
        return lower(graph, self.options)

    def distinct_sizes(self, graph: Graph, sizes: Sequence[int]) -> list[int]:
        """As the CPU's."""
        return distinct_sizes(graph, sizes, self.options)

    def program(self, graph: Graph) -> NullProgram:
        """A program that returns zeros; the plan is made, so a graph that cannot lower fails."""
        return NullProgram(graph, self.plan(graph))

    def load(self, graphs: Sequence[Graph], progress: Progress | None = None) -> None:
        """Plan each graph."""
        for graph in graphs:
            self.plan(graph)

    def close(self) -> None:
        """Nothing to end."""


class NullProgram:
    """The plan of a graph and zeros for its outputs."""

    def __init__(self, graph: Graph, plan: Plan) -> None:
        self.plan = plan
        self._outputs = [o for o in graph.outputs if o.base.op != "state"]

    def run(self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]) -> list[np.ndarray]:
        """Zeros of the live shapes."""
        return [
            np.zeros([live.get(getattr(n, "name", ""), int(n)) for n in o.shape], np.float32)
            for o in self._outputs
        ]
