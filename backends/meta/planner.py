"""What each device of an expression has of a model, and what the devices exchange.

Nothing is opened and nothing is read: a graph of one token says it all. Bytes of weights are those
of the forms that a device keeps them in; what depends on the context (pages, slots) is counted by
the page and the slot, so any context is arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np

from runtime.backends.cpu.planner import Planner, options
from runtime.backends.cuda.layouts import UNIT
from runtime.backends.cuda.planner import Planner as GpuPlanner
from runtime.backends.cuda.planner import options as gpu_options
from runtime.backends.meta.expression import Device
from runtime.backends.meta.graph_stages import OnHost, cut_graph
from runtime.backends.meta.infer import Layout, infer
from runtime.backends.meta.stages import Stage
from runtime.ops.cost import Seen, flops, moves, page_nbytes
from runtime.ops.graph import Graph
from runtime.ops.registry import Kind, find, kind_of
from runtime.ops.splits import MIRRORED, PARTIAL, Split, State, local_shape
from runtime.ops.tensor import LEAVES, Shape, Tensor

PageBytes = Callable[[Tensor], float]  # of one page, or one slot, of a state leaf
Pace = Callable[[Device, Tensor], float]  # of a byte of a weight or state on a device

ON_CPU = ("cpu", "numa", "mpi", "null", "reference")
_EXACT = ("cpu", "numa")  # of one process: no sum is cut


class Exchange(NamedTuple):
    """A tensor that is summed, or gathered whole, over the devices of a stage."""

    tensor: Tensor
    gathered: bool


@dataclass(frozen=True)
class StagePlan:
    """A stretch of the layers, and the devices that have a part of each of its tensors.

    graph: of one token, one page and one slot. layout: None where there is one device.
    """

    graph: Graph
    stage: Stage
    layout: Layout | None

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices, by number."""
        return self.stage.devices

    def state(self, x: Tensor) -> State:
        """How a tensor lies on the devices, once it is computed."""
        return self.layout.states[x] if self.layout else MIRRORED

    def use(self, node: Tensor, number: int) -> State:
        """How a node takes an input: of what is mirrored it may take a part."""
        return self.layout.uses[node][number] if self.layout else MIRRORED

    def weights(self, device: int) -> int:
        """Bytes of the weights on a device, in its own forms."""
        read = self._read(device)
        if self.devices[device].kind in ON_CPU:
            return _CPU.weights_nbytes(read, device == self._with_rows)
        return _GPU.weights_nbytes(read)

    def _read(self, device: int) -> dict[tuple[Tensor, int], Tensor]:
        """The weights that a device reads: (node, number of an input) -> its part."""
        return {
            (node, n): self._local(x.base, state, device)
            for node, n, x, state in self._weights
            if self._takes(node, n, device)
        }

    @cached_property
    def _with_rows(self) -> int:
        """The first device on a CPU that looks up rows as the file has them, which all share."""
        on_cpu = (n for n, each in enumerate(self.devices) if each.kind in ON_CPU)
        return next((n for n in on_cpu if _CPU.looks_up(self._read(n))), 0)

    @cached_property
    def _weights(self) -> list[tuple[Tensor, int, Tensor, State]]:
        """Weights that are read: by a node, as its input of a number, and how that takes it."""
        return [
            (node, n, x, self.use(node, n) if x.op == "weight" else self.state(x.base))
            for node in self.graph.nodes
            for n, x in enumerate(node.inputs)
            if x.base.op == "weight"
        ]

    @cached_property
    def _locals(self) -> dict[tuple[Tensor, Shape], Tensor]:
        return {}

    def _local(self, x: Tensor, state: State, device: int) -> Tensor:
        """What a device has of a leaf: one of a shape is the same for all."""
        if not isinstance(state, Split):
            return x
        key = x, local_shape(x.shape, state, device)
        if key not in self._locals:
            self._locals[key] = x.with_(shape=key[1])
        return self._locals[key]

    def _computes(self, node: Tensor, device: int) -> bool:
        return self.layout is None or node in self._computed[device]

    @cached_property
    def _computed(self) -> list[set[Tensor]]:
        """The nodes that each device computes: those that it has a part of, if it needs them."""
        assert self.layout is not None, "of several devices"
        whole, outputs = self.layout.whole, set(self.graph.outputs)
        found: list[set[Tensor]] = [set() for _ in self.devices]
        for device, live in enumerate(found):
            needed: set[Tensor] = set()
            for node in reversed(self.graph.nodes):
                if not self.layout.holders[node] >> device & 1:
                    continue
                if node in whole or node in outputs or node in needed:
                    live.add(node)
                    needed |= {
                        x
                        for n, x in enumerate(node.inputs)
                        if x not in whole or self.use(node, n) is not MIRRORED
                    }
        return found

    def _takes(self, node: Tensor, number: int, device: int) -> bool:
        """Whether a device reads an input of a node: an addend of a sum is one device's."""
        if not self._computes(node, device):
            return False
        if self.layout is None or self.use(node, number) is not PARTIAL:
            return True
        return not self.layout.holders[node] & (1 << device) - 1

    def pages(self, device: int, nbytes: PageBytes = page_nbytes) -> float:
        """Bytes of one page of the KV cache, all layers together; `nbytes`: of a plain leaf."""
        return self._memory(device, ("k", "v"), nbytes)

    def slots(self, device: int) -> float:
        """Bytes of one slot of recurrent state."""
        return self._memory(device, ("slots",), page_nbytes)

    def reads(self, seen: Seen, pace: Pace = lambda device, x: 1.0) -> list[list[float]]:
        """Bytes that each device reads of weights and cache, and moves of state, each byte times
        its pace: [stretch][device].

        A stretch ends with what is exchanged; nobody begins the next before all are there.
        """

        def cost(node: Tensor, device: int) -> float:
            return sum(
                nbytes * self._portion(node, x, device) * pace(self.devices[device], x.base)
                for x, nbytes, written in moves(node, seen)
                if x.base.op == "weight" or (x.base.op == "state" and not written)
                or x.base.attrs.get("storage") == "slots"
            )  # fmt: skip

        return self._by_stretch(cost)

    def multiplies(self) -> list[list[float]]:
        """Weights that each device multiplies a token of a prompt with: [stretch][device]."""

        def macs(node: Tensor, device: int) -> float:
            inside = getattr(node.shape[0], "name", "") != "outputs"
            if kind_of(node) is not Kind.CONTRACTION or not inside:
                return 0.0
            return flops(node, Seen()) / 2 * self._portion(node, node.inputs[1], device)

        return self._by_stretch(macs)

    def _by_stretch(self, cost: Callable[[Tensor, int], float]) -> list[list[float]]:
        whole = self.layout.whole if self.layout else {}
        at: dict[Tensor, int] = {}
        found: list[list[float]] = []
        for node in self.graph.nodes:
            at[node] = max((at[x] + (x in whole) for x in node.inputs), default=0)
            while len(found) <= at[node]:
                found.append([0.0] * len(self.devices))
            if node.op not in LEAVES:
                for device in range(len(self.devices)):
                    found[at[node]][device] += cost(node, device)
        return found

    def _portion(self, node: Tensor, x: Tensor, device: int) -> float:
        """Which share a device has of what a node reads; of what it may find, what is expected."""
        if not self._computes(node, device):
            return 0.0
        number = node.inputs.index(x) if x in node.inputs and x.op != "state" else -1
        state = self.use(node, number) if number >= 0 else self.state(x)
        if isinstance(state, Split) and state.axis == 0 and number in find(node.op).picks:
            count = node.inputs[find(node.op).picks[number]].size
            return _most_chosen(count, tuple(map(state.local, range(len(self.devices))))) / count
        return _portion(x, state, device)

    @cached_property
    def exchanges(self) -> list[Exchange]:
        """What the devices exchange in a step of one token, in order."""
        if self.layout is None:
            return []
        states = self.layout.states
        return [Exchange(x, states[x] is not PARTIAL) for x in self.layout.whole]

    def _memory(self, device: int, storages: tuple[str, ...], nbytes: PageBytes) -> float:
        leaves = [x for x in self.graph.leaves("state") if x.attrs["storage"] in storages]
        return sum(nbytes(x) * _portion(x, self.state(x), device) for x in leaves)


def _portion(x: Tensor, state: State, device: int) -> float:
    if not isinstance(state, Split):
        return 1.0
    return state.local(device) / (int(x.shape[state.axis]) or 1)


@cache
def _most_chosen(count: int, sizes: tuple[int, ...]) -> float:
    """How many of `count` rows, chosen anywhere, lie on the device that has most of them."""
    shares = np.array(sizes) / sum(sizes)
    return float(np.random.default_rng(0).multinomial(count, shares, 1000).max(1).mean())


_ABOUT = 64 << 20  # bytes
_HOST = Stage(Fraction(1), (Device("cpu"),), (Fraction(1),))
_CPU, _GPU = Planner(options()), GpuPlanner(gpu_options())


def plan_stages(
    graph: Graph, stages: Sequence[Stage], host: OnHost | None = None
) -> list[StagePlan]:
    """Who has what of a graph of one token, one page and one slot. host: what the CPU has."""
    parts: list[tuple[Graph, Stage]] = [(graph, stages[0])]
    if len(stages) > 1 or host:
        cut = cut_graph(graph, [float(s.share) for s in stages], host)
        every = [*[_HOST] * bool(host), *stages]
        owned = zip(cut.stages, cut.owners, strict=True)
        parts = [(each.graph, every[owner]) for each, owner in owned]
    found = []
    for part, stage in parts:
        shares = [float(share) for share in stage.shares]
        exact = all(device.kind in _EXACT for device in stage.devices)
        grain = 1 if exact or stage.devices[0].kind in ON_CPU else UNIT
        layout = infer(part, shares, exact=exact, grain=grain) if len(shares) > 1 else None
        found.append(StagePlan(part, stage, layout))
    return found


def planned(graph: Graph) -> tuple[int, int]:
    """Bytes of activations and scratch of a step on one CPU, and how often its threads meet."""
    plan = _CPU.plan(graph)
    return plan.arena_nbytes + plan.scratch_nbytes, len(plan.instructions)


def planned_on_gpu(graph: Graph) -> int:
    """Bytes of activations on a GPU, where programs of smaller steps keep theirs: about."""
    return -(-2 * _GPU.plan(graph).arena_nbytes // _ABOUT) * _ABOUT


def gpu_page_nbytes(leaf: Tensor) -> int:
    """Bytes of a page, or a slot, of a state leaf on a GPU."""
    return _GPU.page_nbytes(leaf)
