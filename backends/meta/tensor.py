"""Devices that compute every tensor together, each its part, in one call per step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from runtime.backends.base import Progress
from runtime.backends.cpu import CpuBackend
from runtime.backends.cpu.joint import Joint, JointProgram
from runtime.backends.passes.fuse_collectives import fuse_residuals
from runtime.backends.passes.prepare import choose_rows
from runtime.backends.plan.plan import Plan
from runtime.ops.cuts import Parts, cut_array
from runtime.ops.graph import Graph
from runtime.ops.tensor import Tensor

Split = Callable[[Graph, Sequence[float]], Sequence[Graph]]  # graph, shares -> of each device its


def inferred(graph: Graph, shares: Sequence[float]) -> list[Graph]:
    """The graphs of devices with these shares of it."""
    from runtime.backends.meta.infer import infer
    from runtime.backends.meta.shard import shards

    return list(shards(infer(graph, shares)))


class TensorBackend:
    """See backends/base.py. How a state is split is known from a graph that has it; till then all
    devices have all of it.

    devices: each closed with this one. shares: of the work, above 0, one for each device.
    """

    def __init__(
        self, devices: Sequence[CpuBackend], shares: Sequence[float], split: Split = inferred
    ) -> None:
        self._devices, self._shares, self._split = tuple(devices), tuple(shares), split
        self._joint = Joint(devices)
        self.threads = sum(device.threads for device in devices)
        self.name = f"tensor ({', '.join(device.name for device in devices)})"
        self._graphs: dict[str, Sequence[Graph]] = {}
        self._states: dict[str, list[Tensor | None]] = {}  # of each device the part, if it has one
        self._programs: dict[str, JointProgram] = {}

    def graphs(self, graph: Graph) -> Sequence[Graph]:
        """Of each device its part of a graph."""
        key = graph.key()
        if key not in self._graphs:
            made = fuse_residuals(self._split(choose_rows(graph), self._shares))
            self._graphs[key] = made
            found = [{leaf.name: leaf for leaf in each.leaves("state")} for each in made]
            for name in dict.fromkeys(name for each in found for name in each):
                self._states.setdefault(name, [each.get(name) for each in found])
        return self._graphs[key]

    def page_nbytes(self, leaf: Tensor) -> int:
        """Bytes of one page, or slot, on all devices together; of a part of a leaf, its own."""
        if "whole" in leaf.attrs:
            return self._devices[0].page_nbytes(leaf)
        return sum(device.page_nbytes(part) for device, part, _ in self._parts(leaf))

    def copy_pages(
        self, leaves: Sequence[Tensor], sources: Sequence[int], targets: Sequence[int]
    ) -> None:
        """See backends/base.py."""
        for leaf in leaves:
            for device, part, _ in self._parts(leaf):
                device.copy_pages([part], sources, targets)

    def read_state(self, leaf: Tensor, rows: Sequence[int]) -> np.ndarray:
        """See backends/base.py: as one device has it, however it is split."""
        out = np.zeros((len(rows), *map(int, leaf.shape[1:])), np.float32)
        places = np.arange(out.size).reshape(out.shape)
        for device, part, cut in self._parts(leaf):
            out.flat[cut_array(places, cut)] = device.read_state(part, rows)
        return out

    def write_state(self, leaf: Tensor, rows: Sequence[int], values: np.ndarray) -> None:
        """See backends/base.py."""
        for device, part, cut in self._parts(leaf):
            device.write_state(part, rows, cut_array(values, cut))

    def plan(self, graph: Graph) -> Plan:
        """The first device's."""
        return self._plans([graph])[0][0]

    def distinct_sizes(self, graph: Graph, sizes: Sequence[int]) -> list[int]:
        """See `Planner.distinct_sizes`; of any device."""
        found = zip(self._devices, self.graphs(graph), strict=True)
        distinct = {n for device, each in found for n in device.distinct_sizes(each, sizes)}
        return [n for n in sizes if n in distinct]

    def abort(self) -> None:
        """See backends/base.py."""
        self._joint.abort()

    def missing(self, graphs: Sequence[Graph]) -> int:
        """How many kernels of these graphs have yet to be compiled."""
        return self._joint.missing(self._plans(graphs))

    def program(self, graph: Graph) -> JointProgram:
        """The program of a graph, from the cache where an equal graph was seen before."""
        key = graph.key()
        if key not in self._programs:
            self._programs[key] = self._joint.bind([each for (each,) in self._plans([graph])])
        return self._programs[key]

    def load(self, graphs: Sequence[Graph], progress: Progress | None = None) -> None:
        """Compile or load all kernels, once for all devices; then pack weights, on all at once."""
        self._joint.load(self._plans(graphs), progress)

    def close(self) -> None:
        """End the threads of all devices."""
        self._joint.close()
        for device in self._devices:
            device.close()
        self._programs.clear()
        self._graphs.clear()

    def _plans(self, graphs: Sequence[Graph]) -> list[list[Plan]]:
        """Of each device the plans of these graphs."""
        split = [self.graphs(graph) for graph in graphs]
        return [[device.plan(each[n]) for each in split] for n, device in enumerate(self._devices)]

    def _parts(self, leaf: Tensor) -> Iterator[tuple[CpuBackend, Tensor, Parts]]:
        """Of each device that has any of a state: its part of this leaf, and how that is cut.

        Leaves of one name differ in their first axis alone, which is never cut.
        """
        everywhere = [leaf] * len(self._devices)
        for device, found in zip(
            self._devices, self._states.get(leaf.name, everywhere), strict=True
        ):
            if found is not None:
                attrs = dict(found.attrs)
                if "whole" in attrs:
                    attrs["whole"] = (int(leaf.shape[0]), *attrs["whole"][1:])
                part = found.with_(shape=(leaf.shape[0], *found.shape[1:]), attrs=attrs)
                yield device, part, attrs.get("cut", ())
