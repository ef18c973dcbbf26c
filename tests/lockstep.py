"""The graphs of several devices run together in numpy, with what they exchange between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from runtime.backends.meta.infer import Layout
from runtime.backends.reference import compute
from runtime.ops.collective import both, joined
from runtime.ops.cuts import cut_array as cut_runs
from runtime.ops.graph import Graph
from runtime.ops.registry import Kind, kind_of
from runtime.ops.splits import cut_array
from runtime.ops.tensor import Dim, Tensor
from runtime.ops.views import broadcast, reshape

Leaf = Callable[[int, Tensor], np.ndarray]  # device, leaf -> what it holds


class Memory:
    """What states hold on each device. whole: what they hold undivided when first used."""

    def __init__(self, devices: int, whole: Callable[[Tensor], np.ndarray]) -> None:
        self._whole, self.cuts = whole, dict[tuple[int, str], object]()
        self._held: list[dict[str, np.ndarray]] = [{} for _ in range(devices)]

    def part(self, device: int, leaf: Tensor) -> np.ndarray:
        """What one device has of a state; cut alike in all graphs."""
        cut = leaf.attrs.get("cut", ())
        known = self.cuts.setdefault((device, leaf.name), cut)
        assert known == cut, f"{leaf!r} is cut as {cut}, and was as {known}"
        held = self._held[device]
        if leaf.name not in held:
            held[leaf.name] = cut_runs(self._whole(leaf), cut).copy()
        return held[leaf.name]

    def joined(self, layout: Layout, leaf: Tensor) -> np.ndarray:
        """A state undivided; every device that has a stretch of it must have the same there.

        A device that has no use for what others write as well may have no such memory. What no
        device has is NaN.
        """
        state, whole = layout.states[leaf], np.full([int(n) for n in leaf.shape], np.nan)
        places = np.arange(whole.size).reshape(whole.shape)
        for device, held in enumerate(self._held):
            if leaf.name in held:
                own, part = cut_array(places, state, device), held[leaf.name]
                known = whole.flat[own.reshape(-1)].reshape(own.shape)
                same = np.isclose(known, part, 1e-9, 1e-9) | np.isnan(known)
                assert same.all(), f"{leaf!r} differs on device {device}"
                np.put(whole, own, part)
        return whole


def run_together(
    graphs: Sequence[Graph], leaf: Leaf, live: Mapping[str, int]
) -> list[list[np.ndarray]]:
    """One step of all devices: of each the outputs that are no states."""
    held: list[dict[Tensor, np.ndarray]] = [{} for _ in graphs]

    def value(device: int, node: Tensor) -> np.ndarray:
        if node not in held[device]:
            inputs = [value(device, x) for x in node.inputs]
            held[device][node] = _made(node, inputs, live) if inputs else leaf(device, node)
        return held[device][node]

    for together in zip(*map(_collectives, graphs), strict=True):
        inputs = [[value(d, x) for x in node.inputs] for d, node in enumerate(together)]
        residuals = [each.pop() for each in inputs if together[0].attrs.get("residual")]
        whole = joined(together[0], [each[0] if each else None for each in inputs])
        for residual in residuals[:1]:
            whole = whole + residual
            np.testing.assert_array_equal(residuals, [residual] * len(graphs))
        for device, node in enumerate(together):
            held[device][node] = whole
    for device, graph in enumerate(graphs):
        for node in graph.nodes:
            value(device, node)
    return [
        [held[device][o] for o in graph.outputs if o.base.op != "state"]
        for device, graph in enumerate(graphs)
    ]


def _made(node: Tensor, inputs: list[np.ndarray], live: Mapping[str, int]) -> np.ndarray:
    assert kind_of(node) is not Kind.COLLECTIVE, f"{node!r} is asked for before its turn"
    shape = [live.get(n.name, int(n)) if isinstance(n, Dim) else int(n) for n in node.shape]
    if both.made(node):
        return inputs[0]
    if reshape.made(node):
        return inputs[0].reshape(shape)
    return np.broadcast_to(inputs[0], shape) if broadcast.made(node) else compute(node, *inputs)


def _collectives(graph: Graph) -> list[Tensor]:
    found = [node for node in graph.nodes if kind_of(node) is Kind.COLLECTIVE]
    found.sort(key=lambda node: node.attrs["number"])
    assert [node.attrs["number"] for node in found] == list(range(len(found)))
    return found
