"""The graph of one device: the plain graph's ops on local shapes, with collectives between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime.backends.meta.infer import Layout
from runtime.ops.collective import all_gather, all_sum, with_all
from runtime.ops.cuts import Runs
from runtime.ops.graph import Graph
from runtime.ops.registry import find
from runtime.ops.splits import MIRRORED, PARTIAL, Split, State, local_shape
from runtime.ops.tensor import LEAVES, Tensor, constant, state, stored_name, weight
from runtime.ops.views import broadcast, reshape, slice_


def shard(layout: Layout, device: int) -> Graph:
    """What `device` computes; every device has the same collectives in the same order."""
    graph = layout.graph
    local = _Shard(layout, device)
    for node in graph.nodes:
        local.add(node)
    outputs = [local.take(o, layout.kept(o)) for o in graph.outputs]
    wanted = [o for o in outputs if o is not None]
    return Graph(with_all(wanted, local.collectives()), graph.name)


def cut_leaf(leaf: Tensor, axis: int, runs: Runs) -> Tensor:
    """A leaf that is these stretches of another one, which may be cut itself."""
    if leaf.op == "constant":
        return constant(f"{leaf.name}[{axis}]", leaf.attrs["value"], cut={axis: runs})
    whole = leaf.attrs.get("whole", leaf.shape)
    cut = dict(leaf.attrs.get("cut", ()))
    cut[axis] = _within(cut[axis], runs) if axis in cut else runs
    if leaf.op == "state":
        return state(leaf.name, whole, leaf.dtype, leaf.attrs["storage"], cut)
    source = leaf.attrs.get("source", "")
    return weight(stored_name(leaf), whole, leaf.dtype, cut, leaf.name, source)


def _within(outer: Runs, inner: Runs) -> Runs:
    """Stretches `inner` of what the stretches `outer` leave, in numbers of the whole."""
    found = []
    for start, stop in inner:
        at = 0
        for a, b in outer:
            low, high = max(start, at), min(stop, at + b - a)
            if low < high:
                found.append((a + low - at, a + high - at))
            at += b - a
    return tuple(found)


class _Shard:
    """The nodes of one device as they are made; None where it has no part of one."""

    def __init__(self, layout: Layout, device: int) -> None:
        self.layout, self.device = layout, device
        self._made: dict[Tensor, Tensor | None] = {}
        self._whole: dict[Tensor, Tensor] = {}
        self._parts: dict[tuple[Tensor, State], Tensor | None] = {}

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
            self._whole[node] = self._collected(node)

    def collectives(self) -> list[Tensor]:
        """All of them, in order."""
        return list(self._whole.values())

    def take(self, x: Tensor, use: State) -> Tensor | None:
        """A tensor as somebody takes it."""
        own = self.layout.states[x]
        if x in self._whole and use is MIRRORED:
            return self._whole[x]
        if own == use:
            return self._made[x]
        assert isinstance(use, Split), f"{x!r} is {own}, and taken {use}"
        return self._part(self._whole.get(x, self._made[x] or x), use)

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
                self._parts[x, use] = slice_of(x, use.axis, start, stop)
        return self._parts[x, use]

    def _computed(self, node: Tensor) -> Tensor | None:
        uses = self.layout.uses[node]
        first = devices_of(self.layout.holders[node])[0]
        taken = [
            (x if self.device == first else None)  # what is added once
            if use is PARTIAL and x.op in LEAVES
            else self.take(x, use)
            for x, use in zip(node.inputs, uses, strict=True)
        ]
        given = [x for x in taken if x is not None]
        if len(given) < len(taken):  # of a sum, addends that others have
            return given[0]
        return find(node.op)(*given, name=node.name, **self._attrs(node))

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
        bits = layout.holders[node]
        return all_sum(*given, holders=devices_of(bits), **common)


def devices_of(bits: int) -> tuple[int, ...]:
    """The devices that are bits of a number."""
    return tuple(d for d in range(bits.bit_length()) if bits >> d & 1)


def slice_of(x: Tensor, axis: int, start: int, stop: int) -> Tensor:
    """A stretch of an axis."""
    return slice_(x, axis=axis, start=start, stop=stop)


def shards(layout: Layout) -> Sequence[Graph]:
    """The graphs of all devices."""
    return [shard(layout, device) for device in range(layout.devices)]
