"""Devices one behind the other: each has some layers of the model, and hands on what it makes.

A prompt goes through as several steps, of which each stage does another one at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from runtime.backends.base import Backend, Choice, Choosing, Chosen, Program, Progress, Room
from runtime.backends.base import Step as Given
from runtime.backends.meta.graph_stages import OnHost, StagedGraph, cut_graph
from runtime.backends.meta.line import Line, Step
from runtime.backends.meta.rooms import is_apart, rooms_of
from runtime.backends.plan.plan import Plan, Ref
from runtime.ops.errors import BackendError
from runtime.ops.graph import Graph
from runtime.ops.tensor import Tensor

Run = Callable[[Program, Mapping[str, np.ndarray]], Sequence[np.ndarray]]


class LayersBackend:
    """See backends/base.py. `shares`: how much of weights and state each device has, in numbers
    that are compared with one another, one above 0 among them; a device with 0 has nothing.
    host: what another device has, which stands first and has no share.
    """

    def __init__(
        self, devices: Sequence[Backend], shares: Sequence[float] | None = None,
        host: OnHost | None = None,
    ) -> None:  # fmt: skip
        others = devices[bool(host) :]
        shares = [1.0] * len(others) if shares is None else shares
        self._all, self._host = tuple(devices), host
        used = [pair for pair in zip(others, shares, strict=True) if pair[1] > 0]
        self._devices, self._shares = zip(*used, strict=True)
        self._devices = (*devices[: bool(host)], *self._devices)
        self.apart = any(map(is_apart, self._devices))
        # a device that has several stages does one at a time
        self.stages = 1 if host and host.experts else len(self._devices)
        self.chooses = _chooses(self._devices[-1]) and not (host and host.rest == 0)
        self.ahead = all(isinstance(d, Choosing) and d.ahead for d in self._devices)
        self.name = f"layers({', '.join(device.name for device in self._devices)})"
        self.threads = sum(device.threads for device in self._devices)
        self.bits = self._bits()
        self._line = Line(self.stages, partial(_abort, self._devices))
        self._cuts: dict[str, StagedGraph] = {}
        self._programs: dict[str, LayersProgram] = {}
        self._has: dict[str, Backend] = {}  # by the name of a state

    def _bits(self) -> str:
        """Those of one device where all are alike."""
        bits = [device.bits for device in self._devices]
        if len(set(bits)) == 1:
            return bits[0]
        cut = ",".join(f"{share:g}" for share in self._shares)
        return f"layers({', '.join(bits)}; {cut}; {self._host})" * all(bits)

    def page_nbytes(self, leaf: Tensor) -> int:
        """Of the stage that has it; before any graph is known, of the one that needs most."""
        has = [self._has[leaf.name]] if leaf.name in self._has else self._devices
        return max(device.page_nbytes(leaf) for device in has)

    def copy_pages(
        self, leaves: Sequence[Tensor], sources: Sequence[int], targets: Sequence[int]
    ) -> None:
        """See backends/base.py."""
        self._line.settle()
        for leaf in leaves:
            self._of(leaf).copy_pages([leaf], sources, targets)

    def read_state(self, leaf: Tensor, rows: Sequence[int]) -> np.ndarray:
        """See backends/base.py."""
        self._line.settle()
        return self._of(leaf).read_state(leaf, rows)

    def write_state(self, leaf: Tensor, rows: Sequence[int], values: np.ndarray) -> None:
        """See backends/base.py."""
        self._line.settle()
        self._of(leaf).write_state(leaf, rows, values)

    def rooms(self, graph: Graph, host: int | None) -> list[Room]:
        """See backends/base.py."""
        return rooms_of(self._staged(graph), host)

    def plan(self, graph: Graph) -> Plan:
        """The plans of all stages as one, for who looks at it; it cannot be run."""
        return _joined(self._cut(graph), [d.plan(part) for d, part in self._staged(graph)])

    def distinct_sizes(self, graph: Graph, sizes: Sequence[int]) -> list[int]:
        """Those of any stage."""
        found = {n for d, part in self._staged(graph) for n in d.distinct_sizes(part, sizes)}
        return sorted(found)

    def missing(self, graphs: Sequence[Graph]) -> int:
        """Of all stages together; a kernel that several need counts as often."""
        return sum(device.missing(parts) for device, parts in self._parts(graphs))

    def program(self, graph: Graph) -> LayersProgram:
        """The programs of all stages as one."""
        key = graph.key()
        if key not in self._programs:
            programs = [device.program(part) for device, part in self._staged(graph)]
            cut = self._cut(graph)
            devices = [self._devices[n] for n in cut.owners]
            self._programs[key] = LayersProgram(cut, programs, self._line, devices, self.ahead)
        return self._programs[key]

    def choose(
        self, program: LayersProgram, inputs: Mapping[str, Any], live: Mapping[str, int],
        choices: Sequence[Choice],
    ) -> Chosen:  # fmt: skip
        """See `Choosing` in backends/base.py: the last stage's device chooses."""
        return program.choose(inputs, live, choices)

    def begin(self, *_: Any) -> Sequence[Any]:
        """Nothing stands behind layers."""
        raise NotImplementedError

    def load(self, graphs: Sequence[Graph], progress: Progress | None = None) -> None:
        """One device after the other."""
        for device, parts in self._parts(graphs):
            device.load(parts, progress)

    def stream(self, steps: Iterable[Given]) -> Generator[Sequence[np.ndarray]]:
        """See backends/base.py."""
        for step in self._line.through(_begun(steps)):
            yield step.results()

    def abort(self) -> None:
        """See backends/base.py."""
        _abort(self._devices)

    def close(self) -> None:
        """Close all devices, those without a share too."""
        self._line.close()
        self._programs.clear()
        self._cuts.clear()
        for device in self._all:
            device.close()

    def _cut(self, graph: Graph) -> StagedGraph:
        key = graph.key()
        if key not in self._cuts:
            cut = self._lone(graph) or cut_graph(graph, self._shares, self._host)
            for number, stage in zip(cut.owners, cut.stages, strict=True):
                device = self._devices[number]
                for leaf in stage.graph.leaves("state"):
                    has = self._has.setdefault(leaf.name, device)
                    assert has is device, f"{leaf!r} is in another stage of another graph"
            self._cuts[key] = cut
        return self._cuts[key]

    def _lone(self, graph: Graph) -> StagedGraph | None:
        """One stage, where a graph has some of the states of another one, all on one device."""
        names = {leaf.name for leaf in graph.leaves("state")}
        devices = {id(self._has.get(name)) for name in names}
        if not names or not names < self._has.keys() or len(devices) > 1:
            return None
        device = self._has[names.pop()]
        return cut_graph(graph, [1.0])._replace(owners=(self._devices.index(device),))

    def _staged(self, graph: Graph) -> Iterator[tuple[Backend, Graph]]:
        """The stages of a graph in order, each with its device."""
        cut = self._cut(graph)
        for number, stage in zip(cut.owners, cut.stages, strict=True):
            yield self._devices[number], stage.graph

    def _parts(self, graphs: Sequence[Graph]) -> Iterator[tuple[Backend, list[Graph]]]:
        """Of each device its stages of these graphs."""
        found: dict[int, list[Graph]] = {n: [] for n in range(len(self._devices))}
        for cut in map(self._cut, graphs):
            for number, stage in zip(cut.owners, cut.stages, strict=True):
                found[number].append(stage.graph)
        for number, parts in found.items():
            yield self._devices[number], parts

    def _of(self, leaf: Tensor) -> Backend:
        if leaf.name not in self._has:
            raise BackendError(f"no graph of {self.name} has the state {leaf!r}")
        return self._has[leaf.name]


class LayersProgram:
    """See backends/base.py: the programs of all stages."""

    def __init__(
        self, cut: StagedGraph, programs: Sequence[Program], line: Line,
        devices: Sequence[Backend], ahead: bool = False,
    ) -> None:  # fmt: skip
        """devices: of each stage. ahead: all of them are; see `Choosing` in backends/base.py."""
        self._cut, self._programs, self._line = cut, programs, line
        self._devices: Sequence[Any] = devices
        self._ahead = ahead and {*cut.outputs} <= {*cut.stages[-1].results}
        self._chosen: Chosen | None = None
        self.observable = all(program.observable for program in programs)
        self.plan = _joined(cut, [program.plan for program in programs])

    def run(self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]) -> list[np.ndarray]:
        """One stage after the other; where all are such the host does not wait in between."""
        values = self._before(inputs, live)
        results = self._programs[-1].run(values, live)
        values |= zip(self._cut.stages[-1].results, results, strict=True)
        return [values[name] for name in self._cut.outputs]

    def choose(
        self, inputs: Mapping[str, Any], live: Mapping[str, int], choices: Sequence[Choice]
    ) -> Chosen:
        """See `LayersBackend.choose`."""
        assert self._cut.stages[-1].results[:1] == self._cut.outputs[:1], "the logits come last"
        given = dict(inputs)
        if "tokens" not in given and self._chosen is not None:
            given["tokens"] = self._chosen.held
        values = self._before(given, live)
        chosen = self._devices[-1].choose(self._programs[-1], values, live, choices)
        self._chosen = chosen if self._ahead else None
        return chosen

    def _before(self, inputs: Mapping[str, Any], live: Mapping[str, int]) -> dict[str, Any]:
        """What the last stage is given, once those before it have run, or have begun to."""
        self._line.settle()
        values = dict(inputs)
        stages = zip(self._devices, self._programs, self._cut.stages, strict=True)
        for device, program, stage in list(stages)[:-1]:
            run = partial(device.begin, program) if self._ahead else program.run
            values |= zip(stage.results, run(values, live), strict=True)
        return values

    def profile(
        self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """See backends/base.py."""
        times: list[np.ndarray] = []

        def profiled(program: Program, values: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
            results, nanoseconds = program.profile(values, live)
            times.append(nanoseconds)
            return results

        return self.run_by(profiled, inputs), np.concatenate(times)

    def run_by(self, run: Run, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """One stage after the other, its program run by `run`(program, its inputs)."""
        self._line.settle()
        values = dict(inputs)
        for program, stage in zip(self._programs, self._cut.stages, strict=True):
            values |= zip(stage.results, run(program, values), strict=True)
        return [values[name] for name in self._cut.outputs]

    def step(self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]) -> Step:
        """To be done by the threads of a line; what stages hand on are copies."""
        values = dict(inputs)

        def do(program: Program, names: Sequence[str]) -> None:
            copies = map(np.array, program.run(values, live))
            values.update(zip(names, copies, strict=True))

        pairs = zip(self._programs, self._cut.stages, strict=True)
        stages = [partial(do, program, stage.results) for program, stage in pairs]
        return Step(stages, lambda: [values[name] for name in self._cut.outputs])


def _chooses(device: Backend) -> bool:
    return isinstance(device, Choosing) and device.chooses


def _begun(steps: Iterable[Given]) -> Iterator[Step]:
    for program, inputs, live in steps:
        assert isinstance(program, LayersProgram), "a program of this backend"
        yield program.step(inputs, live)


def _abort(devices: Sequence[Backend]) -> None:
    for device in devices:
        device.abort()


def _joined(cut: StagedGraph, plans: Sequence[Plan]) -> Plan:
    """Plans of stages behind one another, for who looks at them."""
    ends: dict[str, tuple[Ref, Tensor]] = {}
    for stage, plan in zip(cut.stages, plans, strict=True):
        made = zip(plan.outputs, plan.output_tensors, strict=True)
        ends |= zip(stage.results, made, strict=False)  # none where nodes are run one by one
    outputs = [ends[name] for name in cut.outputs if name in ends]
    return Plan(
        plans[0].name, [one for plan in plans for one in plan.instructions],
        [ref for ref, _ in outputs], tuple(tensor for _, tensor in outputs),
        arena_nbytes=sum(plan.arena_nbytes for plan in plans),
        scratch_nbytes=max(plan.scratch_nbytes for plan in plans),
        results={node: buffer for plan in plans for node, buffer in plan.results.items()},
    )  # fmt: skip
