"""Program: a plan bound to a GPU's memory, one graph of launches that every step replays.

Nothing in the graph depends on what a step is given: numbers, live counts and lengths are read from
one block of memory, which is copied to the device before the launches run. A second graph also
chooses a token of each row of logits and writes it where the next step reads its tokens, so that
the host can give that step to the device before it knows the token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.backends.base import Choice, Chosen
from runtime.backends.cuda.arena import Buffer
from runtime.backends.cuda.choosing import Choosing
from runtime.backends.cuda.driver import ALIGNMENT
from runtime.backends.cuda.gaps import Gaps
from runtime.backends.cuda.graphs import Graph, dependencies
from runtime.backends.cuda.held import Hands, Held
from runtime.backends.cuda.inputs import Inputs
from runtime.backends.cuda.launcher import Device, Launch, Stream
from runtime.backends.cuda.outputs import Output
from runtime.backends.cuda.stores import Store
from runtime.backends.cuda.tiles import attends, attention_tiles, tile_rows, tiles_name
from runtime.backends.cuda.timeline import Timeline, timeline
from runtime.backends.plan import plan
from runtime.backends.plan.plan import Argument, Call, Plan, Ref
from runtime.ops.errors import BackendError

if TYPE_CHECKING:
    from runtime.backends.cuda.contents import Contents


class Program:
    """See backends/base.py. `graph` False: the same launches, one by one.

    peers: where what other devices give to collectives lies, by the key of its buffer.
    """

    observable = True

    def __init__(
        self, plan: Plan, device: Device, stream: Stream, store: Store, arena: Buffer,
        nothing: Buffer, gaps: Gaps, graph: bool = True,
        peers: Callable[[str], Buffer] | None = None,
    ) -> None:  # fmt: skip
        self._peers = peers
        self.plan, self._stream, self._arena, self._store = plan, stream, arena, store
        self._nothing, self._gaps, self._device = nothing, gaps, device
        nodes = [c.node for c in plan.calls() if attends(c.node)]
        self._tiles = {tiles_name(node): tile_rows(node) for node in nodes}
        self._sequences = nodes[0].inputs[4].name if nodes else ""
        tiles = int(nodes[0].shape[0]) if nodes else 1
        rows = max((int(x.shape[0]) for x in plan.output_tensors if x.ndim), default=1)
        self._inputs = Inputs(device, plan, tiles, rows)
        self._tickets = _Tickets(device, stream, plan)
        self.steps = [self._step(device, call) for call in plan.calls()]
        self.launches = [step for step in self.steps if isinstance(step, Launch)]
        self._replayed = graph
        self._graphs: dict[int, Graph] = {}  # by the number of launches
        self._outputs = [
            Output(device, self._view(ref), tensor)
            for ref, tensor in zip(plan.outputs, plan.output_tensors, strict=True)
        ]
        self._choosing: Choosing | None = None
        self.hands = Hands(device, stream)
        self._open = True

    def run(self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]) -> list[np.ndarray]:
        """One step; see backends/base.py."""
        self.give(inputs, live)
        self._replay(self.launches)
        return self.results(live)

    def begin(self, inputs: Mapping[str, Any], live: Mapping[str, int]) -> list[Held]:
        """See `Choosing` in backends/base.py."""
        self.give(inputs, live)
        self._replay(self.launches)
        return self.held(live)

    def held(self, live: Mapping[str, int]) -> list[Held]:
        """The outputs of the step that the stream was given last."""
        self.hands.done()
        return [output.held(live, self.hands) for output in self._outputs]

    def choose(
        self, inputs: Mapping[str, Any], live: Mapping[str, int], choices: Sequence[Choice]
    ) -> Chosen:
        """Begin a step that ends with tokens; see `Choosing` in backends/base.py."""
        end = self.choosing()
        self.give(inputs, live, choices)
        self._replay([*self.launches, *end.launches])
        return end.fetch(self._stream, len(choices), self.hands)

    def choosing(self) -> Choosing:
        """What follows its launches where a step chooses tokens."""
        self._check_open()
        if self._choosing is None:
            logits = self._view(self.plan.outputs[0])
            self._choosing = Choosing(
                self._device, self._inputs, logits, self.plan.output_tensors[0]
            )
        return self._choosing

    def run_each(
        self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]
    ) -> Iterator[Callable[[], None]]:
        """One step: the launches of each instruction are given by the function for it, once."""
        self.give(inputs, live)
        launches = iter(self.launches)
        for instruction in self.plan.instructions:
            mine = [next(launches) for _ in instruction.calls]
            yield lambda mine=mine: [launch.run(self._stream) for launch in mine]  # type: ignore

    def contents(self, live: Mapping[str, int]) -> Contents:
        """What lies in memory in a step of these live counts, whenever it is asked."""
        from runtime.backends.cuda.contents import Contents

        def copied(buffer: plan.Buffer) -> np.ndarray:
            place = self._view(Ref(buffer)).view(0, buffer.nbytes)
            return place.read(np.empty(buffer.nbytes, np.uint8), self._stream)

        return Contents(self.plan, copied, self._store, live)

    def profile(
        self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """As `run`, launch by launch between events: nanoseconds of each instruction."""
        self.give(inputs, live)
        events = [self._device.event() for _ in range(len(self.launches) + 1)]
        events[0].record(self._stream)
        for launch, event in zip(self.launches, events[1:], strict=True):
            launch.run(self._stream)
            event.record(self._stream)
        found = self.results(live)
        seconds = [after.since(before) for before, after in pairwise(events)]
        for event in events:
            event.close()
        nanoseconds = np.nan_to_num(np.array(seconds) * 1e9).astype(np.int64)
        counts = [len(instruction.calls) for instruction in self.plan.instructions]
        starts = np.concatenate([[0], np.cumsum(counts)])
        each = [int(nanoseconds[a:b].sum()) for a, b in pairwise(starts)]
        return found, np.array(each, np.int64)

    def timeline(self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]) -> Timeline:
        """When each launch of a step runs; see timeline.py."""
        self.give(inputs, live)
        subjects = [call.node.name or call.node.op for call in self.plan.calls()]
        return timeline(
            self._device, self._stream, self.launches, subjects,
            lambda: self._replay(self.launches),
        )  # fmt: skip

    def close(self) -> None:
        """Give back what it alone has."""
        self._open = False
        for graph in self._graphs.values():
            graph.close()
        self._inputs.close()
        self._tickets.close()
        self.hands.close()
        for output in self._outputs:
            output.close()
        if self._choosing is not None:
            self._choosing.close()

    def give(
        self, inputs: Mapping[str, Any], live: Mapping[str, int], choices: Sequence[Choice] = ()
    ) -> None:
        """What the step is given, to the device."""
        self._check_open()
        self._device.activate()
        tiles = {
            name: attention_tiles(inputs[self._sequences], live["tokens"], most)
            for name, most in self._tiles.items()
        }
        self._inputs.send(self._stream, self.plan, inputs, live, tiles, choices)

    def _check_open(self) -> None:
        if not self._open:
            raise BackendError(f"program {self.plan.name} was closed: its backend is")

    def _replay(self, launches: list[Launch]) -> None:
        """All launches, behind what the stream was given."""
        with self._gaps.around(self._stream):
            if not self._replayed:
                for launch in launches:
                    launch.run(self._stream)
                return
            if len(launches) not in self._graphs:
                edges = dependencies(launches, programmatic=True)
                self._graphs[len(launches)] = Graph(self._device, launches, edges)
            self._graphs[len(launches)].replay(self._stream)

    def results(self, live: Mapping[str, int]) -> list[np.ndarray]:
        """The outputs, once the stream has done what it was given; the device is active."""
        for output in self._outputs:
            output.fetch(self._stream, live)
        self._stream.synchronize()
        return [output.array(live) for output in self._outputs]

    def _step(self, device: Device, call: Call) -> Launch | Sum:
        if not call.library:
            return self._launch(device, call)
        source, target = (self._value(call.arguments[name], "f32*") for name in ("x", "out"))
        tokens, *rest = call.node.shape
        return Sum(source, target, math.prod(map(int, rest)), getattr(tokens, "name", ""))

    def _launch(self, device: Device, call: Call) -> Launch:
        function = device.function(call.kernel)
        names = [name for name, _ in function.entry.arguments]
        if sorted(names) != sorted(call.arguments):
            raise BackendError(
                f"kernel {call.kernel} takes {', '.join(names)}, and its rule for "
                f"{call.node.op} gives {', '.join(call.arguments)}"
            )
        kinds = dict(function.entry.arguments)
        values = [self._value(call.arguments[name], kinds[name]) for name in names]
        return Launch(function, call.grid, *values)

    def _value(self, argument: Argument, kind: str) -> Any:
        if isinstance(argument, Ref):
            return self._view(argument)
        return self._nothing.view(0, 0) if kind.endswith("*") else argument

    def _view(self, ref: Ref) -> Buffer:
        memory = ref.buffer.memory
        if memory == "arena":
            size = ref.buffer.nbytes - ref.offset
            return self._arena.view(ref.buffer.offset + ref.offset, size)
        if memory == "tickets":
            return self._tickets.place(ref)
        if memory in ("input", "count"):
            return self._inputs.place_of(ref)
        if memory == "peer":
            assert self._peers is not None, "a graph with collectives is one device's of several"
            return self._peers(ref.buffer.key).view(ref.offset)
        return self._store.place(ref.buffer).view(ref.offset)


@dataclass(frozen=True)
class Sum:
    """A sum over devices that a library makes between launches: of rows, all or those of a dim."""

    source: Buffer
    target: Buffer
    row: int
    dim: str

    def count(self, live: Mapping[str, int]) -> int:
        """How many elements."""
        return live[self.dim] * self.row if self.dim else self.target.nbytes // 4


class _Tickets:
    """What the blocks of a launch count in to find the last of them; 0 between launches."""

    def __init__(self, device: Device, stream: Stream, plan: Plan) -> None:
        self._starts: dict[str, int] = {}
        at = 0
        for buffer in plan.buffers():
            if buffer.memory == "tickets":
                self._starts[buffer.key] = at
                at += -(-buffer.nbytes // ALIGNMENT) * ALIGNMENT
        self._room = device.arena(max(at, 1), "tickets")
        self._memory = self._room.take(max(at, 1))
        self._memory.fill(0, stream)

    def place(self, ref: Ref) -> Buffer:
        """Where the tickets of a call lie."""
        at = self._starts[ref.buffer.key] + ref.offset
        return self._memory.view(at, ref.buffer.nbytes - ref.offset)

    def close(self) -> None:
        self._room.close()
