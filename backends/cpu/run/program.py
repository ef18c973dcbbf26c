"""Program: a plan bound to memory, run by a team of threads in one native call per step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.backends.cpu.abi import ATTENTION_TOKENS
from runtime.backends.cpu.compile.library import Native
from runtime.backends.cpu.run.memory import FixedMemory
from runtime.backends.cpu.run.table import Record, Table
from runtime.backends.plan.kernel import Kernel
from runtime.backends.plan.plan import JOINT, Argument, Buffer, Call, Plan, Ref
from runtime.ops.attention import attention
from runtime.ops.errors import BackendError
from runtime.ops.tensor import Tensor

if TYPE_CHECKING:
    from runtime.backends.cpu.run.contents import Contents

_PER_TILE = 4  # int32 of a tile record: first token, count, sequence row, unused
_LONG = 0.02  # seconds that a step may take without a look at signals


class Pace:
    """How long steps take, and with that which may be long enough to hear of signals meanwhile."""

    def __init__(self) -> None:
        self._seconds = math.inf  # that a row (a token) took in the last step

    def run(self, live: Mapping[str, int], step: Callable[[bool], None]) -> None:
        """Call step(whether it may take long)."""
        rows, started = max(live.values(), default=1), time.perf_counter()
        step(self._seconds * rows > _LONG)
        if rows:  # a step of no rows says nothing about the next one
            self._seconds = (time.perf_counter() - started) / rows


class Program:
    """See backends/base.py. Everything is allocated here; `run` only writes numbers and calls."""

    observable = True

    def __init__(
        self, plan: Plan, team: Any, kernels: Callable[[Kernel], Native],
        memory: FixedMemory, arena: np.ndarray, scratch: np.ndarray,
        joint: Callable[[Buffer], np.ndarray] | None = None,
    ) -> None:  # fmt: skip
        """joint: gives the memory in common with other devices; see exchange.py."""
        self._joint = joint
        self.plan, self._team, self._arena = plan, team, arena
        self._memory, self._scratch = memory, scratch  # kept alive: the table has addresses
        self._inputs: dict[str, np.ndarray] = {}
        self._pace = Pace()
        self._counts = np.zeros(max(1, len(plan.counts)), np.int64)
        self._constants: list[np.ndarray] = []
        self.table = Table(
            [[self._record(kernels(c.kernel), c) for c in one.calls] for one in plan.instructions]
        )
        self._outputs = [
            self._view(ref, tensor)
            for ref, tensor in zip(plan.outputs, plan.output_tensors, strict=True)
        ]
        attention = self._attention()
        self._sequences = attention.inputs[4].name if attention else ""
        self._dims = [
            str(getattr(t.shape[0], "name", "")) if t.shape else "" for t in plan.output_tensors
        ]

    def run(self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]) -> list[np.ndarray]:
        """One step; see backends/base.py. Results are views of the arena."""
        self.prepare(inputs, live)
        self._pace.run(live, lambda long: self._team.run(*self.table.records(), long=long))
        return self.results(live)

    def profile(
        self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """As `run`, with the nanoseconds of each instruction as thread 0 sees them."""
        self.prepare(inputs, live)
        address, count = self.table.records()
        times = np.zeros(count + 1, np.int64)
        self._team.run(address, count, times.ctypes.data)
        return self.results(live), np.diff(times[self.table.starts])

    def run_each(
        self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]
    ) -> Iterator[Callable[[], None]]:
        """One step: each instruction is run by the function that stands for it, once."""
        self.prepare(inputs, live)
        for n in range(len(self.table)):
            yield partial(self._team.run, *self.table.records(n))

    def contents(self, live: Mapping[str, int]) -> Contents:
        """What lies in memory in a step of these live counts, whenever it is asked."""
        from runtime.backends.cpu.run.contents import Contents

        return Contents(self.plan, self._arena, self._memory, live)

    def prepare(self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]) -> None:
        """What a step is given goes to where its calls look for it."""
        for name, room in self._inputs.items():
            if name == "attention_tiles":
                continue
            value = inputs[name]
            if value.shape[:1] > room.shape[:1]:
                raise BackendError(f"step input {name}: {len(value)} rows, room for {len(room)}")
            room[tuple(slice(n) for n in value.shape)] = value
        tiles = 0
        if "attention_tiles" in self._inputs:
            room = self._inputs["attention_tiles"]
            tiles = attention_tiles(inputs[self._sequences], live["tokens"], room)
        for (dim, factor), slot in self.plan.counts.items():
            if dim == "attention_tiles":
                self._counts[slot] = tiles
            else:
                self._counts[slot] = (int(dim[1:]) if dim[0] == "=" else live[dim]) * factor

    def results(self, live: Mapping[str, int]) -> list[np.ndarray]:
        """The graph's outputs after a step of these live counts."""
        pairs = zip(self._outputs, self._dims, strict=True)
        return [out[: live[dim]] if dim else out for out, dim in pairs]

    def _record(self, kernel: Native, call: Call) -> Record:
        arguments = kernel.ordered(call.kernel, call.arguments)
        return kernel.address, [self._value(a) for a in arguments]

    def _value(self, argument: Argument) -> int:
        if isinstance(argument, int):
            return argument
        assert isinstance(argument, Ref), "the CPU's kernels take floats as their bits"
        return self._place(argument.buffer) + argument.offset

    def _place(self, buffer: Buffer) -> int:
        if buffer.memory == "arena":
            return self._arena.ctypes.data + buffer.offset
        if buffer.memory == "scratch":
            return self._scratch.ctypes.data
        if buffer.memory in JOINT:
            return self._in_common(buffer).ctypes.data
        if buffer.memory == "count":
            return self._counts.ctypes.data
        if buffer.memory == "input":
            return self._input(buffer).ctypes.data
        if buffer.memory == "constant":
            assert buffer.tensor is not None, "a constant has its tensor"
            self._constants.append(np.ascontiguousarray(buffer.tensor.attrs["value"]))
            return self._constants[-1].ctypes.data
        return self._memory.address(buffer)

    def _in_common(self, buffer: Buffer) -> np.ndarray:
        assert self._joint is not None, "a graph with collectives is one device's of several"
        return self._joint(buffer)

    def _view(self, ref: Ref, tensor: Tensor) -> np.ndarray:
        """A tensor's memory as an array of its shape and layout."""
        assert tensor.dtype.numpy is not None, f"{tensor!r} has no numpy type"
        item = tensor.dtype.numpy.itemsize
        strides = tuple(s * item for s in tensor.layout.strides)
        shape = tuple(int(n) for n in tensor.shape)
        apart, start = ref.buffer.memory in JOINT, ref.offset
        flat = self._in_common(ref.buffer) if apart else self._arena[ref.buffer.offset :]
        return np.ndarray(shape, tensor.dtype.numpy, flat[start:], strides=strides)

    def _input(self, buffer: Buffer) -> np.ndarray:
        if buffer.key not in self._inputs:
            if buffer.tensor is None:
                attention = self._attention()
                capacity = int(attention.shape[0]) if attention else 1
                self._inputs[buffer.key] = np.zeros((capacity, _PER_TILE), np.int32)
            else:
                shape = tuple(int(n) for n in buffer.tensor.shape)
                self._inputs[buffer.key] = np.zeros(shape, buffer.tensor.dtype.numpy)
        return self._inputs[buffer.key]

    def _attention(self) -> Tensor | None:
        """An attention node of the plan: all of them see the same tokens."""
        nodes = (c.node for c in self.plan.calls() if attention.made(c.node))
        return next(nodes, None)


def attention_tiles(sequences: np.ndarray, tokens: int, out: np.ndarray) -> int:
    """Cut live tokens into runs of one sequence, ATTENTION_TOKENS at most; the number of tiles.

    Long prompts come first in memory but tiles are dealt out to threads one by one, so their
    different lengths even out.
    """
    if tokens == 1:
        out[0] = 0, 1, sequences[0], 0
        return 1
    row = sequences[:tokens]
    if (row[1:] > row[:-1]).all():  # one token each
        out[:tokens, 0], out[:tokens, 1], out[:tokens, 2] = np.arange(tokens), 1, row
        return tokens
    cuts = np.flatnonzero(np.diff(row)) + 1
    starts = np.concatenate([[0], cuts])
    ends = np.concatenate([cuts, [tokens]])
    firsts = np.concatenate(
        [np.arange(a, b, ATTENTION_TOKENS) for a, b in zip(starts, ends, strict=True)]
    )
    lasts = np.minimum(firsts + ATTENTION_TOKENS, ends[np.searchsorted(ends, firsts, side="right")])
    n = len(firsts)
    out[:n, 0], out[:n, 1], out[:n, 2] = firsts, lasts - firsts, row[firsts]
    return n
