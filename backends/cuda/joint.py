"""Several CUDA devices whose launches of a step are one graph, or some with NCCL's sums between.

Each has its own plan, memory and stream; a collective reads the parts of all where they lie. In
the list of all launches those of a collective stand behind what any device computes for it, and
edges follow from the bytes that launches touch, on whatever device: no flag is waited for.

Large sums, those of prompts, are NCCL's on GPUs of their own. A graph is cut there: between two
such sums a device mostly needs nothing of another, so each replays its stretch on its own stream,
in whose order the library's calls stand, and no event holds it up. (Capturing the calls into one
graph would save some microseconds of a step that takes milliseconds, and tie it to what the library
does while it is captured.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from runtime.backends.base import Choice, Chosen, Progress
from runtime.backends.cuda import nccl
from runtime.backends.cuda.arena import Buffer
from runtime.backends.cuda.driver import DeviceLostError
from runtime.backends.cuda.graphs import Graph, dependencies
from runtime.backends.cuda.held import Held
from runtime.backends.cuda.launcher import Event, Launch
from runtime.backends.cuda.program import Program, Sum
from runtime.backends.cuda.rules.collective import peer_key
from runtime.backends.cuda.stores import stored_nbytes
from runtime.backends.environment import nccl_from
from runtime.backends.plan.plan import Plan, weight_buffers

if TYPE_CHECKING:
    from runtime.backends.cuda.backend import CudaBackend


class Joint:
    """Devices that run their graphs of a step together; their owner closes them."""

    def __init__(self, devices: Sequence[CudaBackend]) -> None:
        """BackendError: one cannot read the memory of another."""
        self._devices = tuple(devices)
        self._programs: list[JointProgram] = []
        for one in devices:
            for other in devices:
                one.device.reach(other.device)
        gpus, streams = [d.device for d in devices], [d.stream for d in devices]
        self._nccl, why = nccl.opened(gpus, streams)
        nccl.tell(why)
        for device in devices:
            device.planner.nccl_from = nccl_from(nccl.FROM) if self._nccl else None

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
        self._programs.append(JointProgram(self._devices, programs, self._nccl))
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
        if self._nccl is not None:
            with contextlib.suppress(DeviceLostError):
                for device in self._devices:
                    device.device.activate()
                    device.stream.synchronize()
                self._nccl.close()


class JointProgram:
    """See backends/base.py. Its plan and the times of rows are the first device's."""

    observable = False  # of one device alone it would read what others have not computed

    def __init__(
        self, devices: Sequence[CudaBackend], programs: Sequence[Program],
        library: nccl.Nccl | None = None,
    ) -> None:  # fmt: skip
        first = programs[0].plan
        self.plan = replace(first, name=f"{first.name}, the first of {len(programs)} devices")
        self._devices, self._programs = tuple(devices), tuple(programs)
        places = list(merged([program.plan for program in programs]))
        calls = [program.plan.calls() for program in programs]
        steps = [(n, programs[n].steps[at]) for n, at in places]
        self._stretches = list(_stretches(steps, [calls[n][at].meets for n, at in places]))
        self._nccl = library
        # by the number of a stretch, and whether tokens are chosen at its end
        self._graphs: dict[tuple[int, bool], list[tuple[CudaBackend, Graph]]] = {}
        self._events = [device.device.event() for device in devices]

    def run(self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]) -> list[np.ndarray]:
        """One step of all devices; results as the first one has them."""
        for program in self._programs:
            program.give(inputs, live)
        self._replay(live)
        return self._programs[0].results(live)

    def begin(self, inputs: Mapping[str, Any], live: Mapping[str, int]) -> list[Held]:
        """See `Choosing` in backends/base.py: what the first device has."""
        for program in self._programs:
            program.give(inputs, live)
        self._replay(live)
        return self._programs[0].held(live)

    def choose(
        self, inputs: Mapping[str, Any], live: Mapping[str, int], choices: Sequence[Choice]
    ) -> Chosen:
        """See `Choosing` in backends/base.py: every device chooses for itself, all the same."""
        ends = [program.choosing() for program in self._programs]
        for program in self._programs:
            program.give(inputs, live, choices)
        self._replay(live, [(n, launch) for n, end in enumerate(ends) for launch in end.launches])
        return ends[0].fetch(self._devices[0].stream, len(choices), self._programs[0].hands)

    def profile(
        self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """As `run`, launch by launch: nanoseconds of each instruction of the first device."""
        for program in self._programs:
            program.give(inputs, live)
        spans: list[tuple[Event, Event]] = []
        for stretch in self._stretches:
            for n, launch in stretch.launches:
                self._alone(n)
                with nullcontext() if n else self._timed(spans):
                    launch.run(self._devices[n].stream)
            if stretch.sums:
                self._alone(0)
                with self._timed(spans):
                    self._sum(stretch.sums, live)
        self._alone(0)
        results = self._programs[0].results(live)
        self._behind(0)
        seconds = [end.since(start) for start, end in spans]
        for event in (event for span in spans for event in span):
            event.close()
        counts = [len(instruction.calls) for instruction in self.plan.instructions]
        ends = np.cumsum(np.nan_to_num(np.array([0.0, *seconds])))[np.cumsum([0, *counts])]
        return results, np.diff(ends * 1e9).astype(np.int64)

    def close(self) -> None:
        """Give back what it alone has."""
        for graphs in self._graphs.values():
            for _, graph in graphs:
                graph.close()
        for event in self._events:
            event.close()
        for program in self._programs:
            program.close()

    def _replay(self, live: Mapping[str, int], more: Sequence[tuple[int, Launch]] = ()) -> None:
        """All launches and sums, behind what the streams were given."""
        first, last = self._devices[0], len(self._stretches) - 1
        with first.gaps.around(first.stream):
            for at, stretch in enumerate(self._stretches):
                self._go(at, stretch, more if at == last else ())
                if stretch.sums:
                    self._sum(stretch.sums, live)
        if last:
            self._alone(0)
        self._behind(0)

    def _go(self, at: int, stretch: _Stretch, more: Sequence[tuple[int, Launch]]) -> None:
        """The launches of a stretch: of all in one graph, or of each device in its own."""
        replayed = self._devices[0].graphs
        together = stretch.meets or not replayed
        if together:
            self._alone(0)
        if replayed:
            for device, graph in self._graphs_of(at, stretch, more):
                device.device.activate()
                graph.replay(device.stream)
        else:
            self._one_by_one([*stretch.launches, *more])
            self._alone(0)
        if together and at < len(self._stretches) - 1:
            self._behind(0)

    def _graphs_of(
        self, at: int, stretch: _Stretch, more: Sequence[tuple[int, Launch]]
    ) -> list[tuple[CudaBackend, Graph]]:
        """Those of a stretch, made once, with the devices on whose streams they are replayed."""
        key = at, bool(more)
        if key not in self._graphs:
            parts: dict[int, list[Launch]] = {}
            for n, launch in (*stretch.launches, *more):
                parts.setdefault(0 if stretch.meets else n, []).append(launch)
            found = []
            for n, launches in sorted(parts.items()):
                device, edges = self._devices[n], dependencies(launches, programmatic=True)
                found.append((device, Graph(device.device, launches, edges)))
            self._graphs[key] = found
        return self._graphs[key]

    def _one_by_one(self, pairs: Sequence[tuple[int, Launch]]) -> None:
        for n, each in groupby(pairs, lambda pair: pair[0]):
            self._alone(n)
            for _, launch in each:
                launch.run(self._devices[n].stream)

    def _sum(self, sums: Sequence[Sum], live: Mapping[str, int]) -> None:
        """One of NCCL's, in the order of every stream."""
        assert self._nccl is not None, "plans have such sums only where it is"
        self._nccl.sum(
            [each.source.address for each in sums], [each.target.address for each in sums],
            sums[0].count(live), [device.stream.handle for device in self._devices],
        )  # fmt: skip
        self._devices[0].device.activate()

    @contextlib.contextmanager
    def _timed(self, spans: list[tuple[Event, Event]]) -> Iterator[None]:
        """What the first device is given, between two events more."""
        first = self._devices[0]
        spans.append((first.device.event(), first.device.event()))
        spans[-1][0].record(first.stream)
        yield
        spans[-1][1].record(first.stream)

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


class _Stretch(NamedTuple):
    """Launches, with their devices, up to a sum of NCCL's; `meets`: whether any is a collective's.

    sums: that sum, of each device its part; none behind the last.
    """

    launches: list[tuple[int, Launch]]
    meets: bool
    sums: list[Sum]


def _stretches(
    steps: Sequence[tuple[int, Launch | Sum]], meets: Sequence[bool]
) -> Iterator[_Stretch]:
    """All of them in order; without sums there is one, which is for all devices together."""
    launches: list[tuple[int, Launch]] = []
    sums: list[Sum] = []
    together = not any(isinstance(step, Sum) for _, step in steps)
    for (n, step), meeting in zip(steps, meets, strict=True):
        if sums and (n == 0 or isinstance(step, Launch)):
            yield _Stretch(launches, together, sums)
            launches, sums, together = [], [], False
        if isinstance(step, Sum):
            sums.append(step)
        else:
            launches.append((n, step))
            together = together or meeting
    yield _Stretch(launches, together, sums)


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
