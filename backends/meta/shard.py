"""The graph of one device: the plain graph's ops on local shapes, with collectives between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime.backends.meta.infer import Layout
from runtime.ops.collective import all_gather, all_sum, with_all
from runtime.ops.graph import Graph
from runtime.ops.moe import renumber
from runtime.ops.registry import find
from runtime.ops.splits import MIRRORED, PARTIAL, Routed, Split, State, local_shape, owners_of
from runtime.ops.tensor import LEAVES, Tensor, constant, cut_leaf
from runtime.ops.views import broadcast, reshape, slice_


def shard(layout: Layout, device: int) -> Graph:
    """What `device` computes; every device has the same collectives in the same order."""
    local = _Shard(layout, device)
    for node in layout.graph.nodes:
        local.add(node)
    outputs = [local.take(o, layout.kept(o)) for o in layout.graph.outputs]
    wanted = [o for o in outputs if o is not None]
    return Graph(with_all(wanted, [*local.whole.values()]), layout.graph.name)


class _Shard:
    """The nodes of one device as they are made; None where it has no part of one.

    whole: of nodes that are summed or gathered what comes of it, in order.
    """

    def __init__(self, layout: Layout, device: int) -> None:
        self.layout, self.device = layout, device
        self._made: dict[Tensor, Tensor | None] = {}
        self.whole: dict[Tensor, Tensor] = {}
        self._parts: dict[tuple[Tensor, State], Tensor | None] = {}
        self._chosen: dict[Routed, Tensor] = {}

    def add(self, node: Tensor) -> None:
        """Make the node, and what is made of it for those that take it whole."""
        own = self.layout.states[node]
        if node.op in LEAVES:
            self._made[node] = self._part(node, own) if isinstance(own, Split) else node
        elif self.layout.holders[node] >> self.device & 1:
            self._made[node] = self._computed(node)
        else:
            self._made[node] = None
        if node in self.layout.whole:
            self.whole[node] = self._collected(node)

    def take(self, x: Tensor, use: State) -> Tensor | None:
        """A tensor as somebody takes it."""
        own = self.layout.states[x]
        if x in self.whole and use is MIRRORED:
            return self.whole[x]
        one = isinstance(use, Split) and len(use.cut(self.device)) == 1
        if own == use and not (x in self.whole and one):
            return self._made[x]
        assert isinstance(use, Split), f"{x!r} is {own}, and taken {use}"
        return self._part(self.whole.get(x, self._made[x] or x), use)

    def _part(self, x: Tensor, use: Split) -> Tensor | None:
        """This device's stretches of a tensor that it has whole."""
        if (x, use) not in self._parts:
            runs = use.cut(self.device)
            if not runs:
                self._parts[x, use] = None
            elif x.op in ("weight", "constant", "state"):
                self._parts[x, use] = cut_leaf(x, use.axis, runs)
            else:
                ((start, stop),) = runs
                self._parts[x, use] = slice_(x, axis=use.axis, start=start, stop=stop)
        return self._parts[x, use]

    def _computed(self, node: Tensor) -> Tensor | None:
        uses = self.layout.uses[node]
        taken = [
            (x if owners_of(self.layout.holders[node])[0] == self.device else None)  # added once
            if use is PARTIAL and x.op in LEAVES
            else self.take(x, use)
            for x, use in zip(node.inputs, uses, strict=True)
        ]
        given = [x for x in taken if x is not None]
        if len(given) < len(taken):  # of a sum, addends that others have
            return given[0]
        ways = [s for s in (self.layout.states[node], *uses) if isinstance(s, Routed)]
        for way in ways[:1]:
            picked, own = {node.inputs[by] for by in find(node.op).picks.values()}, self._own(way)
            given = [own if x in picked else y for x, y in zip(node.inputs, given, strict=True)]
            given += [] if isinstance(self.layout.states[node], Routed) else [own]
        return find(node.op)(*given, name=node.name, **self._attrs(node))

    def _own(self, way: Routed) -> Tensor:
        """The experts chosen, by their numbers here."""
        if way not in self._chosen:
            here = way.experts.masks() >> self.device & 1
            numbers = np.where(here, np.cumsum(here) - 1, -1).astype(np.int32)
            ids, table = self.take(way.ids, MIRRORED) or way.ids, constant("experts here", numbers)
            self._chosen[way] = renumber(ids, table, name=f"{way.ids.name} here")
        return self._chosen[way]

    def _attrs(self, node: Tensor) -> dict[str, Any]:
        attrs = dict(node.attrs)
        if reshape.made(node) or broadcast.made(node):
            attrs["shape"] = local_shape(node.shape, self.layout.states[node], self.device)
        if slice_.made(node):
            (use,) = self.layout.uses[node]
            if isinstance(use, Split) and use.axis == attrs["axis"] % node.ndim:
                own = np.append(0, np.cumsum(use.masks() >> self.device & 1))
                attrs |= {"start": int(own[attrs["start"]]), "stop": int(own[attrs["stop"]])}
        return attrs

    def _collected(self, node: Tensor) -> Tensor:
        layout, own = self.layout, self.layout.states[node]
        part = self._made[node]
        given = () if part is None else (part,)
        common: dict[str, Any] = {
            "shape": node.shape, "device": self.device, "devices": layout.devices,
            "number": layout.whole[node], "name": node.name,
        }  # fmt: skip
        if isinstance(own, Split):
            return all_gather(
                *given, axis=own.axis, runs=own.runs, repeat=own.repeat, dtype=node.dtype, **common
            )
        return all_sum(*given, holders=owners_of(layout.holders[node]), **common)


def shards(layout: Layout) -> Sequence[Graph]:
    """The graphs of all devices."""
    return [shard(layout, device) for device in range(layout.devices)]
