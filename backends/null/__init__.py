"""The null backend: plans everything as another device would and runs nothing, any number of times.

For planning, memory figures and tests of whatever surrounds a model, an 80B graph included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from runtime.backends.base import Planner, Progress
from runtime.backends.plan.plan import Plan
from runtime.ops.graph import Graph
from runtime.ops.tensor import Tensor


class NullBackend:
    """See backends/base.py; results are zeros, of the shapes a device would give."""

    bits = "null"  # zeros

    def __init__(self, planner: Planner, devices: int = 1) -> None:
        """planner: of the device that it stands for."""
        self.name = f"null ({devices} device{'s' * (devices != 1)})"
        self.device_count, self.threads = devices, 1
        self.planner = planner

    def page_nbytes(self, leaf: Tensor) -> int:
        """What a page would take on the device."""
        return self.planner.page_nbytes(leaf)

    def copy_pages(
        self, leaves: Sequence[Tensor], sources: Sequence[int], targets: Sequence[int]
    ) -> None:
        """Nothing: block tables work, nothing is stored."""

    def read_state(self, leaf: Tensor, rows: Sequence[int]) -> np.ndarray:
        """Zeros."""
        return np.zeros((len(rows), *map(int, leaf.shape[1:])), np.float32)

    def write_state(self, leaf: Tensor, rows: Sequence[int], values: np.ndarray) -> None:
        """Nothing."""

    def plan(self, graph: Graph) -> Plan:
        """The device's plan of a graph."""
        return self.planner.plan(graph)

    def distinct_sizes(self, graph: Graph, sizes: Sequence[int]) -> list[int]:
        """As the device's."""
        return self.planner.distinct_sizes(graph, sizes)

    def abort(self) -> None:
        """Nothing: nothing runs."""

    def missing(self, graphs: Sequence[Graph]) -> int:
        """None: nothing is compiled."""
        return 0

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

    observable = False

    def __init__(self, graph: Graph, plan: Plan) -> None:
        self.plan = plan
        self._outputs = [o for o in graph.outputs if o.base.op != "state"]

    def run(self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]) -> list[np.ndarray]:
        """Zeros of the live shapes."""
        return [
            np.zeros([live.get(getattr(n, "name", ""), int(n)) for n in o.shape], np.float32)
            for o in self._outputs
        ]

    def profile(
        self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """No time at all."""
        return self.run(inputs, live), np.zeros(len(self.plan.instructions), np.int64)
