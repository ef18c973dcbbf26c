"""Program: a plan bound to a GPU's memory, one graph of launches that every step replays.

Nothing in the graph depends on what a step is given: numbers, live counts and lengths are read from
one block of memory, which is copied to the device before the launches run.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from runtime.backends.cuda.arena import Buffer
from runtime.backends.cuda.driver import ALIGNMENT
from runtime.backends.cuda.graphs import Graph, dependencies
from runtime.backends.cuda.launcher import Device, Launch, Stream
from runtime.backends.cuda.stores import Store
from runtime.backends.cuda.tiles import attention_tiles, tile_rows
from runtime.backends.plan import plan
from runtime.backends.plan.plan import Argument, Call, Plan, Ref
from runtime.ops.attention import attention
from runtime.ops.errors import BackendError
from runtime.ops.tensor import Tensor


class Program:
    """See backends/base.py. `graph` False: the same launches, one by one."""

    observable = False

    def __init__(
        self, plan: Plan, device: Device, stream: Stream, store: Store, arena: Buffer,
        nothing: Buffer, graph: bool = True,
    ) -> None:  # fmt: skip
        self.plan, self._stream, self._arena, self._store = plan, stream, arena, store
        self._nothing = nothing
        attention_node = next((c.node for c in plan.calls() if attention.made(c.node)), None)
        self._tile_rows = tile_rows(attention_node) if attention_node is not None else 1
        self._sequences = attention_node.inputs[4].name if attention_node is not None else ""
        self._capacity = int(attention_node.shape[0]) if attention_node is not None else 1
        self._given = _Given(device, plan, self._capacity)
        self._tickets = _Tickets(device, stream, plan)
        self.launches = [self._launch(device, call) for call in plan.calls()]
        edges = dependencies(self.launches, programmatic=True)
        self._graph = Graph(device, self.launches, edges) if graph else None
        self._outputs = [
            _Output(device, self._view(ref, tensor.nbytes), tensor)
            for ref, tensor in zip(plan.outputs, plan.output_tensors, strict=True)
        ]
        self._device = device

    def run(self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]) -> list[np.ndarray]:
        """One step; see backends/base.py."""
        self._device.activate()
        self._given.fill(self.plan, inputs, live, self._tiles(inputs, live))
        self._given.send(self._stream)
        if self._graph is not None:
            self._graph.replay(self._stream)
        else:
            for launch in self.launches:
                launch.run(self._stream)
        for output in self._outputs:
            output.fetch(self._stream)
        self._stream.synchronize()
        return [output.array(live) for output in self._outputs]

    def profile(
        self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """As `run`, launch by launch between events: nanoseconds of each instruction."""
        self._device.activate()
        self._given.fill(self.plan, inputs, live, self._tiles(inputs, live))
        self._given.send(self._stream)
        events = [self._device.event() for _ in range(len(self.launches) + 1)]
        events[0].record(self._stream)
        for launch, event in zip(self.launches, events[1:], strict=True):
            launch.run(self._stream)
            event.record(self._stream)
        for output in self._outputs:
            output.fetch(self._stream)
        self._stream.synchronize()
        seconds = [after.since(before) for before, after in pairwise(events)]
        for event in events:
            event.close()
        nanoseconds = np.nan_to_num(np.array(seconds) * 1e9).astype(np.int64)
        counts = [len(instruction.calls) for instruction in self.plan.instructions]
        starts = np.concatenate([[0], np.cumsum(counts)])
        each = [int(nanoseconds[a:b].sum()) for a, b in pairwise(starts)]
        return [output.array(live) for output in self._outputs], np.array(each, np.int64)

    def close(self) -> None:
        """Give back what it alone has."""
        if self._graph is not None:
            self._graph.close()
        self._given.close()
        self._tickets.close()
        for output in self._outputs:
            output.close()

    def _tiles(self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]) -> Any:
        if not self._sequences:
            return None
        return attention_tiles(inputs[self._sequences], live["tokens"], self._tile_rows)

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
        return self._nothing if kind.endswith("*") else argument

    def _view(self, ref: Ref, nbytes: int | None = None) -> Buffer:
        memory = ref.buffer.memory
        if memory == "arena":
            size = ref.buffer.nbytes - ref.offset
            return self._arena.view(ref.buffer.offset + ref.offset, min(size, nbytes or size))
        if memory == "tickets":
            return self._tickets.place(ref)
        if memory in ("input", "count"):
            return self._given.place(ref)
        return self._store.place(ref.buffer).view(ref.offset)


class _Given:
    """What a step is given, in one block: inputs by name, tiles of attention, live counts."""

    def __init__(self, device: Device, plan: Plan, capacity: int) -> None:
        self._starts: dict[str, int] = {}
        self._shapes: dict[str, tuple[tuple[int, ...], Any]] = {}
        at = 0
        for buffer in plan.buffers():
            if buffer.memory == "count":
                shape, dtype = (max(1, len(plan.counts)),), np.dtype(np.int64)
            elif buffer.memory == "input" and buffer.tensor is None:
                shape, dtype = (capacity, 4), np.dtype(np.int32)
            elif buffer.memory == "input":
                assert buffer.tensor is not None and buffer.tensor.dtype.numpy is not None
                shape = tuple(int(n) for n in buffer.tensor.shape)
                dtype = buffer.tensor.dtype.numpy
            else:
                continue
            if buffer.key in self._starts:
                continue
            self._starts[buffer.key], self._shapes[buffer.key] = at, (shape, dtype)
            nbytes = max(1, int(np.prod(shape)) * dtype.itemsize)
            at += -(-nbytes // ALIGNMENT) * ALIGNMENT
        self._host = device.pinned((max(at, 1),), np.uint8)
        self._host.array[:] = 0
        self._room = device.arena(max(at, 1), "step inputs")
        self._device = self._room.take(max(at, 1))
        self.arrays = {name: self._array(name) for name in self._starts}

    def place(self, ref: Ref) -> Buffer:
        """Where an input lies on the device."""
        start, (shape, dtype) = self._starts[ref.buffer.key], self._shapes[ref.buffer.key]
        nbytes = max(1, int(np.prod(shape)) * dtype.itemsize)
        return self._device.view(start + ref.offset, nbytes - ref.offset)

    def fill(
        self, plan: Plan, inputs: Mapping[str, np.ndarray], live: Mapping[str, int],
        tiles: np.ndarray | None,
    ) -> None:  # fmt: skip
        """Numbers of this step; what is behind the live ones stays, but tiles are ended by 0."""
        for name, room in self.arrays.items():
            if name == "counts":
                for (dim, factor), slot in plan.counts.items():
                    room[slot] = (int(dim[1:]) if dim[0] == "=" else live[dim]) * factor
            elif name == "attention_tiles":
                assert tiles is not None, "there is attention"
                room[: len(tiles)], room[len(tiles) :] = tiles, 0
            else:
                value = inputs[name]
                if value.shape[:1] > room.shape[:1]:
                    raise BackendError(
                        f"step input {name}: {len(value)} rows, room for {len(room)}"
                    )
                room[tuple(slice(n) for n in value.shape)] = value

    def send(self, stream: Stream) -> None:
        """To the device, in the stream's order."""
        self._device.write(self._host.array, stream)

    def close(self) -> None:
        self._host.close()
        self._room.close()

    def _array(self, name: str) -> np.ndarray:
        start, (shape, dtype) = self._starts[name], self._shapes[name]
        nbytes = int(np.prod(shape)) * dtype.itemsize
        return self._host.array[start : start + nbytes].view(dtype).reshape(shape)


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


class _Output:
    """An output of the graph, fetched to pinned memory."""

    def __init__(self, device: Device, source: Buffer, tensor: Tensor) -> None:
        assert tensor.dtype.numpy is not None, f"{tensor!r} has no numpy type"
        self._source, self._tensor = source, tensor
        self._host = device.pinned((max(source.nbytes, 1),), np.uint8)
        first = tensor.shape[0] if tensor.shape else None
        self._dim = str(getattr(first, "name", ""))

    def fetch(self, stream: Stream) -> None:
        driver = self._source._arena.device.driver
        address = self._host.array.ctypes.data
        driver.copy_to_host(address, self._source.address, self._source.nbytes, stream.handle)

    def array(self, live: Mapping[str, int]) -> np.ndarray:
        item = self._tensor.dtype.numpy.itemsize  # type: ignore[union-attr]
        strides = tuple(s * item for s in self._tensor.layout.strides)
        shape = tuple(int(n) for n in self._tensor.shape)
        whole = np.ndarray(shape, self._tensor.dtype.numpy, self._host.array, strides=strides)
        return whole[: live[self._dim]] if self._dim else whole

    def close(self) -> None:
        self._host.close()


def arena_nbytes(plans: list[plan.Plan]) -> int:
    """Bytes that any of these plans needs for what it computes."""
    return max((p.arena_nbytes for p in plans), default=0)
