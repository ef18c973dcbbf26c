"""A graph cut into stages: stretches of its nodes, one behind the other, each a graph of its own.

Between any two nodes is a place. What is computed before a place and used behind it crosses there:
stages behind have it as a step input. Leaves do not cross, nor do views and what follows from step
inputs and constants alone, such as the angles of RoPE: each stage makes these for itself. All
that touches a state stands in one stage.

A host may have the first layers, or the experts of some layers in the middle of what others have;
then a device has several stages.

Everything is counted for a step of one token, so the graphs of a model are cut alike whatever room
they have, and a state is always in the same stage.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from runtime.backends.layer_names import layer_of
from runtime.ops.cost import page_nbytes
from runtime.ops.dtypes import F32, I32
from runtime.ops.errors import BackendError, OptionError
from runtime.ops.graph import Graph
from runtime.ops.registry import Kind, find, kind_of
from runtime.ops.tensor import LEAVES, Dim, Tensor, step_input

_PAGES = 128  # of a cache that count as held, beside one slot of a recurrent state
_SLACK = 0.25  # of an even share, by which shares may fit worse where less crosses


class StageGraph(NamedTuple):
    """A graph, and the names under which later stages and the caller know what it returns."""

    graph: Graph
    results: tuple[str, ...]


class StagedGraph(NamedTuple):
    """The stages of a graph in order; `outputs`: what the whole returns, by these names.

    owners: of each stage the number of its device.
    """

    stages: tuple[StageGraph, ...]
    outputs: tuple[str, ...]
    owners: tuple[int, ...]


class OnHost(NamedTuple):
    """What the first device has, and nothing else.

    The embedding and all layers but the last `rest`, of which what follows the layers is one (None:
    all are others'), and the experts of the first so many layers that have `experts`.
    """

    rest: int | None = None
    experts: int = 0


class _Place(NamedTuple):
    """Before a computed node: bytes of weights and state that lie before it, bytes that cross."""

    at: int
    before: float
    crossing: int


class _Nodes:
    """The nodes of a graph that are computed in one stage alone, and what each follows from."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.computed = graph, list[Tensor]()
        self.number: dict[Tensor, int] = {}  # where in `computed`
        self.needs: list[frozenset[Tensor]] = []  # of each: computed nodes, weights and states
        self.roots: dict[Tensor, frozenset[Tensor]] = {}  # what any node is made of: such ones
        for node in graph.nodes:
            needs = frozenset[Tensor]().union(*(self.roots[x] for x in node.inputs))
            if _made_anywhere(node, needs):
                self.roots[node] = needs
                continue
            self.roots[node] = frozenset([node])
            if node.op not in LEAVES:
                self.number[node] = len(self.computed)
                self.computed.append(node)
                self.needs.append(needs)
        self.names = {x: f"{x.name or x.op}@{n}" for n, x in enumerate(graph.nodes)}
        self.end = max(1, len(self.computed))
        self.last_use = list(range(self.end))
        for n, needs in enumerate(self.needs):
            for x in needs & self.number.keys():
                self.last_use[self.number[x]] = n
        self._measure()

    def home(self, output: Tensor) -> int:
        """The number of the node that completes an output of the graph."""
        found = [self.number[x] for x in self.roots[output] if x in self.number]
        return max(found, default=self.end - 1)

    def first_of(self, rest: int) -> int:
        """The first node of the last `rest` layers, of which what follows the layers is one."""
        numbers = [self._layer(n) for n in range(len(self.computed))]
        if not any(number is not None for number in numbers):
            raise OptionError("the weights of this model do not say of which layer they are")
        layers = [n for n, number in enumerate(numbers) if number is not None]
        first = max(number or 0 for number in numbers) + 2 - rest
        if first <= 0:
            return 0
        if behind := [n for n in layers if (numbers[n] or 0) >= first]:
            return behind[0]
        weights = (n for n, needs in enumerate(self.needs) if any(x.op == "weight" for x in needs))
        return next((n for n in weights if n > layers[-1]), len(self.computed))

    def _layer(self, n: int) -> int | None:
        return layer_of(x.name for x in self.needs[n] if x.op == "weight")

    def experts(self) -> list[tuple[int, int]]:
        """(the first, behind the last) of the nodes that use experts, layer by layer.

        What follows them without weights or state belongs to them as far as less crosses there.
        """
        groups: dict[Tensor, list[int]] = {}
        for n, node in enumerate(self.computed):
            for number, by in find(node.op).picks.items():
                if node.inputs[number].op == "weight":
                    groups.setdefault(node.inputs[by], []).append(n)
        found = []
        for numbers in groups.values():
            if not any(kind_of(self.computed[n]) is Kind.CONTRACTION for n in numbers):
                continue  # rows that are looked up
            end = last = numbers[-1] + 1
            while last < len(self.computed) and not self._holds(last):
                last += 1
                end = last if self.crossing[last] < self.crossing[end] else end
            found.append((numbers[0], end))
        return found

    def _holds(self, n: int) -> bool:
        node = self.computed[n]
        read = {x.base.op for x in (node, *node.inputs)}
        return "state" in read or any(x.op == "weight" for x in self.needs[n])

    def _measure(self) -> None:
        """Bytes that each node is the first to hold, and that cross before it; where none may."""
        size = len(self.computed) + 1
        held, crossing, closed = np.zeros(size), np.zeros(size, np.int64), np.zeros(size, bool)
        touched: dict[Hashable, tuple[int, int]] = {}  # a state -> the first and the last node
        for n, node in enumerate(self.computed):
            across = slice(n + 1, self.last_use[n] + 1)
            crossing[across] += _nbytes(node)
            closed[across] |= node.dtype not in (F32, I32)
            held[n + 1] += sum(x.nbytes for x in self.needs[n] if x.op == "weight")
            for state in {x.base for x in (node, *node.inputs) if x.base.op == "state"}:
                if state.content not in touched:
                    held[n + 1] += _state_nbytes(state)
                touched[state.content] = touched.get(state.content, (n, n))[0], n
        for first, last in touched.values():
            closed[first + 1 : last + 1] = True
        self.held, self.crossing, self.closed = held, crossing, closed

    def places(
        self, start: int = 0, apart: Sequence[tuple[int, int]] = ()
    ) -> tuple[list[_Place], float]:
        """Where what begins at `start` can be cut, and all bytes held from there on.

        Of neighbours with the same weights and state before them the one where least crosses.
        apart: stretches that are another device's.
        """
        held, closed, crossing = self.held.copy(), self.closed.copy(), self.crossing
        held[: start + 1], closed[: start + bool(start)] = 0, True
        for first, end in apart:
            held[first + 1 : end + 1], closed[first + 1 : end] = 0, True
        least: dict[float, _Place] = {}
        for at, before in enumerate(held.cumsum().tolist()):
            place = _Place(at, before, int(crossing[at]))
            if not closed[at] and place.crossing < least.get(before, _NOWHERE).crossing:
                least[before] = place
        total = float(held.sum())
        return [place for place in least.values() if 0 < place.before < total], total

    def stage(self, start: int, stop: int) -> StageGraph:
        """Computed nodes start..stop-1 as a graph; what comes from before is a step input."""
        made: dict[Tensor, Tensor] = {}
        for node in self.graph.nodes:
            n = self.number.get(node, start)
            if n < start:
                made[node] = step_input(self.names[node], node.shape, node.dtype)
            elif n < stop and all(x in made for x in node.inputs):
                inputs = tuple(made[x] for x in node.inputs)
                made[node] = node if inputs == node.inputs else node.with_(inputs=inputs)
        cross = [x for x in self.computed[start:stop] if self.last_use[self.number[x]] >= stop]
        kept = {*cross, *(x for x in self.graph.outputs if start <= self.home(x) < stop)}
        outputs = [x for x in self.graph.nodes if x in kept]
        names = tuple(self.names[x] for x in outputs if x.base.op != "state")
        return StageGraph(Graph(tuple(made[x] for x in outputs), self.graph.name), names)


_NOWHERE = _Place(-1, 0.0, 1 << 62)


def cut_graph(graph: Graph, shares: Sequence[float], host: OnHost | None = None) -> StagedGraph:
    """As many stages as there are shares (above 0), each with about its share of what is held.

    Held are the bytes of the weights, and of the state of one sequence. Of all places those are
    taken where least crosses, as far as the shares still fit about as well. host: what a device
    before those of the shares has. OptionError: more shares than stages that a graph can have.
    """
    nodes, shares = _Nodes(graph), list(shares)
    start = nodes.first_of(host.rest) if host and host.rest is not None else 0
    apart = [x for x in nodes.experts()[: host.experts] if x[0] >= start] if host else []
    places, total = nodes.places(start, apart)
    if len(places) < len(shares) - 1:
        raise OptionError(
            f"{len(shares)} devices, one behind the other, for a model that can be cut into "
            f"{len(places) + 1} stages: give at most {len(places) + 1} devices"
        )
    wanted = (np.cumsum(shares)[:-1] / sum(shares) * total).tolist()
    ends = [place.at for place in _chosen(places, wanted, _SLACK * total / len(shares))]
    owned = enumerate(pairwise([start, *ends, nodes.end]), bool(host))
    pieces = list(_pieces([(0, start, 0), *((a, b, n) for n, (a, b) in owned)], apart))
    for first, _, _ in pieces:
        if nodes.closed[first]:
            raise BackendError(f"{graph.name} cannot be cut before {nodes.computed[first]!r}")
    outputs = tuple(nodes.names[x] for x in graph.outputs if x.base.op != "state")
    stages, owners = tuple(nodes.stage(a, b) for a, b, _ in pieces), (n for _, _, n in pieces)
    return StagedGraph(stages, outputs, tuple(owners))


def _pieces(
    bounds: Sequence[tuple[int, int, int]], apart: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int, int]]:
    """(first node, behind the last, device) in order, with stretches `apart` as the first's."""
    owner = [device for first, end, device in bounds for _ in range(first, end)]
    for first, end in apart:
        owner[first:end] = [0] * (end - first)
    first = 0
    for n in range(1, len(owner) + 1):
        if n == len(owner) or owner[n] != owner[first]:
            yield first, n, owner[first]
            first = n


def _made_anywhere(node: Tensor, needs: frozenset[Tensor]) -> bool:
    """Whether a stage makes it for itself: a view, or nothing that needs weights or state."""
    if node.op in LEAVES:
        return node.op in ("input", "constant")
    if kind_of(node) is Kind.VIEW:
        return node.base.op != "state"
    return not needs and kind_of(node) is not Kind.CONTRACTION


def _chosen(places: list[_Place], wanted: list[float], slack: float) -> list[_Place]:
    """Of the places one for each number of bytes that should lie before it.

    Those that let the least cross of which the worst fits as well as any, within `slack` bytes.
    """
    found: list[tuple[float, list[_Place]]] = []
    for most in sorted({place.crossing for place in places}):
        allowed = [place for place in places if place.crossing <= most]
        if len(allowed) >= len(wanted):
            nearest = _nearest(allowed, wanted)
            misfits = [abs(p.before - want) for p, want in zip(nearest, wanted, strict=True)]
            found.append((max(misfits, default=0.0), nearest))
    best = min((misfit for misfit, _ in found), default=0.0)
    return next((nearest for misfit, nearest in found if misfit <= best + slack), [])


def _nearest(places: list[_Place], wanted: list[float]) -> list[_Place]:
    """The places nearest to where they are wanted, in order, each another one."""
    chosen: list[_Place] = []
    first = 0
    for n, want in enumerate(wanted):
        last = len(places) - len(wanted) + n  # so that one is left for each of the others
        at = min(range(first, last + 1), key=lambda i: abs(places[i].before - want))
        chosen.append(places[at])
        first = at + 1
    return chosen


def _nbytes(x: Tensor) -> int:
    """Of one token."""
    return math.prod(1 if isinstance(n, Dim) else int(n) for n in x.shape) * x.dtype.nbytes


def _state_nbytes(leaf: Tensor) -> int:
    """Of one sequence."""
    return page_nbytes(leaf) * (1 if leaf.attrs["storage"] == "slots" else _PAGES)
