"""The reference backend: every op's numpy reference in float64, one node after the other.

Slow and exact. It runs whole models, and VALIDATE judges each call of other backends by what its
op means here (`compute`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from runtime.backends.base import Progress, stored_tensor
from runtime.backends.passes.meanings import MEANINGS
from runtime.backends.plan.plan import Plan
from runtime.ops.cuts import cut_array
from runtime.ops.graph import Graph, walk
from runtime.ops.quants import dequantize
from runtime.ops.registry import find
from runtime.ops.tensor import Dim, Tensor
from runtime.ops.views import broadcast, reshape


class ReferenceBackend:
    """See backends/base.py."""

    name = "reference (numpy, float64)"
    threads = 1
    bits = ""  # states are of float64, and given as float32

    def __init__(self, file: Any = None) -> None:
        self._file = file
        self._states: dict[Hashable, np.ndarray] = {}
        self._weights: dict[Hashable, np.ndarray] = {}

    def state(self, leaf: Tensor) -> np.ndarray:
        """In the leaf's own shape: float32 pages [pages, PAGE, heads, dim], float64 slots."""
        if leaf.content not in self._states:
            wide = np.float64 if leaf.attrs["storage"] == "slots" else np.float32
            self._states[leaf.content] = np.zeros([int(n) for n in leaf.shape], wide)
        return self._states[leaf.content]

    def page_nbytes(self, leaf: Tensor) -> int:
        """Bytes of one page in float32, or of one slot in float64."""
        return (8 if leaf.attrs["storage"] == "slots" else 4) * leaf.size // int(leaf.shape[0])

    def copy_pages(
        self, leaves: Sequence[Tensor], sources: Sequence[int], targets: Sequence[int]
    ) -> None:
        """See backends/base.py."""
        for leaf in leaves:
            self.state(leaf)[list(targets)] = self.state(leaf)[list(sources)]

    def read_state(self, leaf: Tensor, rows: Sequence[int]) -> np.ndarray:
        """See backends/base.py."""
        return self.state(leaf)[list(rows)].astype(np.float32)

    def write_state(self, leaf: Tensor, rows: Sequence[int], values: np.ndarray) -> None:
        """See backends/base.py."""
        self.state(leaf)[list(rows)] = values

    def plan(self, graph: Graph) -> Plan:
        """See backends/base.py."""
        return self.program(graph).plan

    def distinct_sizes(self, graph: Graph, sizes: Sequence[int]) -> list[int]:
        """None: nothing is compiled."""
        return []

    def abort(self) -> None:
        """Nothing: a step goes on to its end."""

    def missing(self, graphs: Sequence[Graph]) -> int:
        """None: nothing is compiled."""
        return 0

    def program(self, graph: Graph) -> ReferenceProgram:
        """A program that walks the graph."""
        return ReferenceProgram(graph, self.weight, self.state)

    def load(self, graphs: Sequence[Graph], progress: Progress | None = None) -> None:
        """Nothing to prepare: weights are widened on first use."""

    def weight(self, leaf: Tensor) -> np.ndarray:
        """A weight as float64, in its shape; kept."""
        if leaf.content not in self._weights:
            self._weights[leaf.content] = self.stored(leaf).astype(np.float64)
        return self._weights[leaf.content]

    def stored(self, leaf: Tensor) -> np.ndarray:
        """A weight as float32, which every stored value fits in, in its shape; made anew."""
        stored = stored_tensor(self._file, leaf).to_float32()
        whole = stored.reshape(leaf.attrs.get("whole", leaf.shape))
        return cut_array(whole, leaf.attrs.get("cut", ()))

    def close(self) -> None:
        """Drop weights and state."""
        self._weights.clear()
        self._states.clear()


class ReferenceProgram:
    """Runs a graph on live rows only; `values` of the last run can be looked up by name."""

    observable = False  # it is what others are compared with

    def __init__(
        self, graph: Graph, weight: Callable[[Tensor], np.ndarray],
        state: Callable[[Tensor], np.ndarray],
    ) -> None:  # fmt: skip
        self.graph, self._weight, self._state = graph, weight, state
        self.plan = Plan(graph.name, [], [], ())  # nodes are run one by one
        self.values: dict[str, np.ndarray] = {}

    def run(self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]) -> list[np.ndarray]:
        """See backends/base.py; results are float64."""
        rules: dict[Any, Callable[..., Any]] = {
            "input": lambda node: _live_part(node, inputs[node.name], live),
            "weight": self._weight,
            "constant": lambda node: node.attrs["value"],
            "state": self._state,
            reshape: lambda node, x: x.reshape(_live_shape(node, live)),
            broadcast: lambda node, x: np.broadcast_to(x, _live_shape(node, live)),
        }
        found = walk(self.graph, rules, compute)
        by_node = dict(zip(self.graph.nodes, found, strict=True))
        self.values = {node.name: value for node, value in by_node.items() if node.name}
        return [by_node[o] for o in self.graph.outputs if o.base.op != "state"]

    def profile(
        self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """See backends/base.py; a plan without rows has no times."""
        return self.run(inputs, live), np.zeros(0, np.int64)


def compute(node: Tensor, *inputs: np.ndarray) -> np.ndarray:
    """What a node is, plain or fused, in float64 (integers as they are); changes its states.

    Weights may be float32: they are widened where they are used.
    """
    narrow = (np.float16, np.float32)
    wide = [
        x.astype(np.float64) if x.dtype in narrow and source.base.op not in _KEPT else x
        for x, source in zip(inputs, node.inputs, strict=True)
    ]
    if node.op in MEANINGS:
        return MEANINGS[node.op](node, *wide)
    return find(node.op).reference(*wide, **node.attrs)


_KEPT = ("weight", "state")


def _live_shape(node: Tensor, live: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(live[n.name] if isinstance(n, Dim) else int(n) for n in node.shape)


def _live_part(node: Tensor, value: np.ndarray, live: Mapping[str, int]) -> np.ndarray:
    part = value[: _live_shape(node, live)[0]] if node.shape else value
    # bfloat16 is kept as its bits, which no numpy type reads
    return dequantize(part, node.dtype, part.shape) if node.dtype.name == "bf16" else part
