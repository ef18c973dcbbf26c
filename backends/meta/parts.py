"""What each of several devices has of graphs and of the states in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np

from runtime.backends.base import Planner
from runtime.backends.passes.fuse_collectives import fuse_residuals, gather_for_products
from runtime.backends.passes.prepare import choose_rows
from runtime.ops.cuts import Parts, cut_array
from runtime.ops.graph import Graph
from runtime.ops.tensor import Tensor

Split = Callable[[Graph, Sequence[float]], Sequence[Graph]]  # graph, shares -> of each device its


def inferred(
    graph: Graph, shares: Sequence[float], told: bool = True, exact: bool = False, grain: int = 1
) -> list[Graph]:
    """The graphs of devices with these shares of it; told: what has no part is said on stderr.

    exact, grain: see `infer`; what is gathered for products is packed before.
    """
    from runtime.backends.meta.idle import idle, tell
    from runtime.backends.meta.infer import infer
    from runtime.backends.meta.shard import shards

    layout = infer(graph, shares, exact=exact, grain=grain)
    if told:
        tell(idle(layout, "the model"))
    made = list(shards(layout))
    return gather_for_products(made) if exact else made


exactly = partial(inferred, exact=True)


class SplitGraphs:
    """Graphs of devices with these shares. How a state is split is known from a graph that has it;
    till then all devices have all of it.
    """

    def __init__(self, shares: Sequence[float], split: Split = inferred) -> None:
        self._shares, self._split = tuple(shares), split
        self._graphs: dict[str, Sequence[Graph]] = {}
        self._states: dict[str, list[Tensor | None]] = {}  # of each device the part, if it has one

    def of(self, graph: Graph) -> Sequence[Graph]:
        """Of each device its part of a graph."""
        key = graph.key()
        if key not in self._graphs:
            made = fuse_residuals(self._split(choose_rows(graph), self._shares))
            self._graphs[key] = made
            found = [{leaf.name: leaf for leaf in each.leaves("state")} for each in made]
            for name in dict.fromkeys(name for each in found for name in each):
                self._states.setdefault(name, [each.get(name) for each in found])
        return self._graphs[key]

    def distinct_sizes(
        self, graph: Graph, sizes: Sequence[int], devices: Iterable[Planner]
    ) -> list[int]:
        """See `Planner.distinct_sizes`; of any of the devices."""
        pairs = zip(devices, self.of(graph), strict=False)
        distinct = {n for device, each in pairs for n in device.distinct_sizes(each, sizes)}
        return [n for n in sizes if n in distinct]

    def states(self, leaf: Tensor) -> list[Tensor | None]:
        """Of each device its part of a state leaf; None: it has none.

        Leaves of one name differ in their first axis alone, which is never cut.
        """
        everywhere: list[Tensor | None] = [leaf] * len(self._shares)
        return [part and _sized(part, leaf) for part in self._states.get(leaf.name, everywhere)]

    def clear(self) -> None:
        """Forget the graphs."""
        self._graphs.clear()


def cut_of(part: Tensor) -> Parts:
    """How a part of a state is cut from all of it."""
    return part.attrs.get("cut", ())


def joined(leaf: Tensor, rows: int, parts: Iterable[tuple[Parts, np.ndarray]]) -> np.ndarray:
    """So many rows of a state as one device has them, of parts: how each is cut, and its rows."""
    found = list(parts)
    shape, as_bytes = [rows, *map(int, leaf.shape[1:])], False
    if found and found[0][1].dtype == np.uint8:  # of whole heads
        shape[-1], as_bytes = found[0][1].shape[-1], True
    out = np.zeros(shape, np.uint8 if as_bytes else np.float32)
    places = np.arange(out.size).reshape(out.shape)
    for cut, values in found:
        out.flat[cut_array(places, cut)] = values
    return out


def _sized(part: Tensor, leaf: Tensor) -> Tensor:
    attrs = dict(part.attrs)
    if "whole" in attrs:
        attrs["whole"] = (int(leaf.shape[0]), *attrs["whole"][1:])
    return part.with_(shape=(leaf.shape[0], *part.shape[1:]), attrs=attrs)
