"""Several CUDA devices whose launches of a step are one graph.

Each has its own plan, memory and stream; a collective reads the parts of all where they lie. In
the list of all launches those of a collective stand behind what any device computes for it, and
edges follow from the bytes that launches touch, on whatever device: no flag is waited for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.backends.base import Choice, Chosen, Progress
from runtime.backends.cuda.arena import Buffer
from runtime.backends.cuda.graphs import Graph, dependencies
from runtime.backends.cuda.held import Held
from runtime.backends.cuda.launcher import Event, Launch
from runtime.backends.cuda.rules.collective import peer_key
from runtime.backends.cuda.stores import stored_nbytes
from runtime.backends.plan.plan import Plan, weight_buffers

if TYPE_CHECKING:
    from runtime.backends.cuda.backend import CudaBackend
    from runtime.backends.cuda.program import Program


class Joint:
    """Devices that run their graphs of a step together; their owner closes them."""

    def __init__(self, devices: Sequence[CudaBackend]) -> None:
        """BackendError: one cannot read the memory of another."""
        self._devices = tuple(devices)
        self._programs: list[JointProgram] = []
        for one in devices:
            for other in devices:
                one.device.reach(other.device)

    def bind(self, plans: Sequence[Plan]) -> JointProgram:
        """The program of a plan of each device."""
        given: dict[str, Buffer] = {}
        for n, (device, plan) in enumerate(zip(self._devices, plans, strict=True)):
            work = device.work(plan.arena_nbytes)
            for number, ref in plan.parts.items():
                start, nbytes = ref.buffer.offset + ref.offset, ref.buffer.nbytes - ref.offset
                given[peer_key(number, n)] = work.view(start, nbytes)
        pairs = zip(self._devices, plans, strict=True)
        programs = [device.bind(plan, given.__getitem__) for device, plan in pairs]
        self._programs.append(JointProgram(self._devices, programs))
        return self._programs[-1]

    def missing(self, plans: Sequence[Sequence[Plan]]) -> int:
        """How many kernels of these plans, of each device some, have yet to be compiled."""
        kernels = {k for each in plans for plan in each for k in plan.kernels()}
        return self._devices[0].device.missing(list(kernels))

    def load(self, plans: Sequence[Sequence[Plan]], progress: Progress | None = None) -> None:
        """Kernels of these plans, of each device some; then the weights, device by device."""
        buffers = [weight_buffers(each) for each in plans]
        total, done = sum(stored_nbytes(b) for each in buffers for b in each), 0
        for device, each in zip(self._devices, plans, strict=True):
            device.device.activate()
            device.device.prepare([k for plan in each for k in plan.kernels()], progress)
        for device, of_one in zip(self._devices, buffers, strict=True):
            device.device.activate()
            for nbytes in device.store.load(of_one):
                done += nbytes
                if progress:
                    progress(done, total, "loading weights")

    def abort(self) -> None:
        """A step cannot be ended early: it takes milliseconds."""

    def close(self) -> None:
        """Give back what programs have beside what is the devices'."""
        for program in self._programs:
            program.close()
        self._programs.clear()


class JointProgram:
    """See backends/base.py. Its plan and the times of rows are the first device's."""

    observable = False  # of one device alone it would read what others have not computed

    def __init__(self, devices: Sequence[CudaBackend], programs: Sequence[Program]) -> None:
        first = programs[0].plan
        self.plan = replace(first, name=f"{first.name}, the first of {len(programs)} devices")
        self._devices, self._programs = tuple(devices), tuple(programs)
        places = list(merged([program.plan for program in programs]))
        self.launches = [(n, programs[n].launches[at]) for n, at in places]
        self._graphs: dict[bool, Graph] = {}  # by whether it chooses tokens
        self._events = [device.device.event() for device in devices]

    def run(self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]) -> list[np.ndarray]:
        """One step of all devices; results as the first one has them."""
        for program in self._programs:
            program.give(inputs, live)
        self._alone(0)
        self._replay()
        return self._programs[0].fetched(live)

    def begin(self, inputs: Mapping[str, Any], live: Mapping[str, int]) -> list[Held]:
        """See `Choosing` in backends/base.py: what the first device has."""
        for program in self._programs:
            program.give(inputs, live)
        self._alone(0)
        self._replay()
        return self._programs[0].held(live)

    def choose(
        self, inputs: Mapping[str, Any], live: Mapping[str, int], choices: Sequence[Choice]
    ) -> Chosen:
        """See `Choosing` in backends/base.py: every device chooses for itself, all the same."""
        ends = [program.choosing() for program in self._programs]
        for program in self._programs:
            program.give(inputs, live, choices)
        self._alone(0)
        self._replay([(n, launch) for n, end in enumerate(ends) for launch in end.launches])
        return ends[0].fetch(self._devices[0].stream, len(choices), self._programs[0].hands)

    def profile(
        self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """As `run`, launch by launch: nanoseconds of each instruction of the first device."""
        for program in self._programs:
            program.give(inputs, live)
        first = self._devices[0]
        spans: list[tuple[Event, Event]] = []
        for n, launch in self.launches:
            self._alone(n)
            if n:
                launch.run(self._devices[n].stream)
                continue
            spans.append((first.device.event(), first.device.event()))
            spans[-1][0].record(first.stream)
            launch.run(first.stream)
            spans[-1][1].record(first.stream)
        self._alone(0)
        results = self._programs[0].fetched(live)
        self._behind(0)
        seconds = [end.since(start) for start, end in spans]
        for event in (event for span in spans for event in span):
            event.close()
        counts = [len(instruction.calls) for instruction in self.plan.instructions]
        ends = np.cumsum(np.nan_to_num(np.array([0.0, *seconds])))[np.cumsum([0, *counts])]
        return results, np.diff(ends * 1e9).astype(np.int64)

    def close(self) -> None:
        """Give back what it alone has."""
        for graph in self._graphs.values():
            graph.close()
        for event in self._events:
            event.close()
        for program in self._programs:
            program.close()

    def _replay(self, more: Sequence[tuple[int, Launch]] = ()) -> None:
        """All launches, behind what the first device's stream was given; the others' wait."""
        first, pairs = self._devices[0], [*self.launches, *more]
        with first.gaps.around(first.stream):
            if first.graphs:
                if bool(more) not in self._graphs:
                    launches = [launch for _, launch in pairs]
                    edges = dependencies(launches, programmatic=True)
                    self._graphs[bool(more)] = Graph(first.device, launches, edges)
                self._graphs[bool(more)].replay(first.stream)
            else:
                for n, each in groupby(pairs, lambda pair: pair[0]):
                    self._alone(n)
                    for _, launch in each:
                        launch.run(self._devices[n].stream)
                self._alone(0)
        self._behind(0)

    def _behind(self, device: int) -> None:
        """The others' streams go on when that device's has done what it was given."""
        self._devices[device].device.activate()
        self._events[device].record(self._devices[device].stream)
        for n, other in enumerate(self._devices):
            if n != device:
                other.device.activate()
                other.stream.wait(self._events[device])
        self._devices[device].device.activate()

    def _alone(self, device: int) -> None:
        """That device's stream goes on when all others have done what they were given."""
        for n, event in enumerate(self._events):
            if n != device:
                self._devices[n].device.activate()
                event.record(self._devices[n].stream)
        self._devices[device].device.activate()
        for n, event in enumerate(self._events):
            if n != device:
                self._devices[device].stream.wait(event)


def merged(plans: Sequence[Plan]) -> Iterator[tuple[int, int]]:
    """(device, number of the call in its plan) of all calls, in an order that computes the right.

    The calls of a collective stand behind all that any device has before its own of that one.
    """
    calls = [plan.calls() for plan in plans]
    numbers = {c.node.attrs["number"] for each in calls for c in each if c.meets}
    at = [0] * len(plans)

    def until(device: int, end: int) -> Iterator[tuple[int, int]]:
        yield from ((device, n) for n in range(at[device], end))
        at[device] = max(at[device], end)

    for number in sorted(numbers):
        spans: list[tuple[int, int]] = []
        for each in calls:
            own = [n for n, c in enumerate(each) if c.meets and c.node.attrs["number"] == number]
            spans.append((own[0], own[-1] + 1))
        for device, (first, _) in enumerate(spans):
            yield from until(device, first)
        for device, (_, end) in enumerate(spans):
            yield from until(device, end)
    for device, each in enumerate(calls):
        yield from until(device, len(each))
