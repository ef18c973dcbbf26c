"""Devices that compute every tensor together, each its part, in one call per step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from runtime.backends.base import Choice, Choosing, Chosen, Joinable, Program, Progress, Room
from runtime.backends.meta.parts import Split, SplitGraphs, cut_of, inferred, joined
from runtime.backends.meta.rooms import is_apart, rooms_of
from runtime.backends.plan.plan import Plan
from runtime.ops.cuts import cut_array
from runtime.ops.graph import Graph
from runtime.ops.tensor import Tensor


class TensorBackend:
    """See backends/base.py.

    devices: of one kind, each closed with this one. shares: of the work, above 0, one for each
    device. split: by default so that no sum is cut where devices of that kind are `exact`.
    """

    def __init__(
        self, devices: Sequence[Joinable], shares: Sequence[float], split: Split | None = None
    ) -> None:
        first = devices[0]
        bits = [device.bits for device in devices]
        alike = split is None and first.exact and len(set(bits)) == 1
        cut = ",".join(f"{share:g} {each}" for share, each in zip(shares, bits, strict=True))
        self.bits = bits[0] if alike else f"tensor({cut})" * all(bits)
        if split is None:
            split = partial(inferred, exact=first.exact, grain=first.grain)
        self._devices, self._split = tuple(devices), SplitGraphs(shares, split)
        self._joint, self.apart = first.joined(devices), is_apart(first)
        self.threads = sum(device.threads for device in devices)
        self.name = f"tensor ({', '.join(device.name for device in devices)})"
        self.chooses = isinstance(first, Choosing) and first.chooses
        self.ahead = isinstance(first, Choosing) and first.ahead
        self._programs: dict[str, Program] = {}

    def graphs(self, graph: Graph) -> Sequence[Graph]:
        """Of each device its part of a graph."""
        return self._split.of(graph)

    def page_nbytes(self, leaf: Tensor) -> int:
        """Bytes of one page, or slot, on all devices together; of a part of a leaf, its own."""
        if "whole" in leaf.attrs:
            return self._devices[0].page_nbytes(leaf)
        return sum(device.page_nbytes(part) for device, part in self._parts(leaf))

    def copy_pages(
        self, leaves: Sequence[Tensor], sources: Sequence[int], targets: Sequence[int]
    ) -> None:
        """See backends/base.py."""
        for leaf in leaves:
            for device, part in self._parts(leaf):
                device.copy_pages([part], sources, targets)

    def read_state(self, leaf: Tensor, rows: Sequence[int]) -> np.ndarray:
        """See backends/base.py: as one device has it, however it is split."""
        parts = self._parts(leaf)
        return joined(leaf, len(rows), ((cut_of(p), d.read_state(p, rows)) for d, p in parts))

    def write_state(self, leaf: Tensor, rows: Sequence[int], values: np.ndarray) -> None:
        """See backends/base.py."""
        for device, part in self._parts(leaf):
            device.write_state(part, rows, cut_array(values, cut_of(part)))

    def rooms(self, graph: Graph, host: int | None) -> list[Room]:
        """See backends/base.py."""
        return rooms_of(zip(self._devices, self.graphs(graph), strict=True), host)

    def plan(self, graph: Graph) -> Plan:
        """The first device's."""
        return self._plans([graph])[0][0]

    def distinct_sizes(self, graph: Graph, sizes: Sequence[int]) -> list[int]:
        """See `Planner.distinct_sizes`; of any device."""
        return self._split.distinct_sizes(graph, sizes, self._devices)

    def abort(self) -> None:
        """See backends/base.py."""
        self._joint.abort()

    def missing(self, graphs: Sequence[Graph]) -> int:
        """How many kernels of these graphs have yet to be compiled."""
        return self._joint.missing(self._plans(graphs))

    def program(self, graph: Graph) -> Program:
        """The program of a graph, from the cache where an equal graph was seen before."""
        key = graph.key()
        if key not in self._programs:
            self._programs[key] = self._joint.bind([each for (each,) in self._plans([graph])])
        return self._programs[key]

    def begin(self, program: Any, inputs: Mapping[str, Any], live: Mapping[str, int]) -> Any:
        """See `Choosing` in backends/base.py, where devices are such."""
        return program.begin(inputs, live)

    def choose(
        self, program: Any, inputs: Mapping[str, Any], live: Mapping[str, int],
        choices: Sequence[Choice],
    ) -> Chosen:  # fmt: skip
        """See `Choosing` in backends/base.py, where devices are such."""
        return program.choose(inputs, live, choices)

    def load(self, graphs: Sequence[Graph], progress: Progress | None = None) -> None:
        """Compile or load all kernels, once for all devices; then pack weights, on all at once."""
        self._joint.load(self._plans(graphs), progress)

    def close(self) -> None:
        """End the threads of all devices."""
        self._joint.close()
        for device in self._devices:
            device.close()
        self._programs.clear()
        self._split.clear()

    def _plans(self, graphs: Sequence[Graph]) -> list[list[Plan]]:
        """Of each device the plans of these graphs."""
        split = [self.graphs(graph) for graph in graphs]
        return [[device.plan(each[n]) for each in split] for n, device in enumerate(self._devices)]

    def _parts(self, leaf: Tensor) -> Iterator[tuple[Joinable, Tensor]]:
        """Each device that has any of a state, with its part of this leaf."""
        for device, part in zip(self._devices, self._split.states(leaf), strict=True):
            if part is not None:
                yield device, part
