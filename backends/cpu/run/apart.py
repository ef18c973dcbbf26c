"""What one device's program of a graph has in common with devices of other processes.

The kernels are those of devices that share memory. Where these would only meet, the last thread to
come calls back, and what the others need is sent: of a sum every part to everybody, who each add
them up in the same order; of a gather each stretch.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from runtime.backends.cpu.abi import CONTROL
from runtime.backends.cpu.run.block import control_block
from runtime.backends.cpu.run.control import ABORT, HOST, MEMBERS, OVER
from runtime.backends.cpu.run.exchange import Exchange
from runtime.backends.cpu.run.weights import aligned
from runtime.backends.plan.plan import ALIGNMENT, Buffer, Call, Plan, Ref
from runtime.ops.splits import Split
from runtime.ops.tensor import Tensor

# all_to_all(what this device sends to each, bytes of every device, where they go, and at which of
# its bytes each begins): all of them bytes. False: the step ends here, on all devices.
AllToAll = Callable[[np.ndarray, Sequence[int], np.ndarray, Sequence[int]], bool]
Act = Callable[[], bool]
_Callback = ctypes.CFUNCTYPE(ctypes.c_int64, *(ctypes.c_int64,) * 4)


class Meeting:
    """Where the threads of one device meet, and with them the other processes."""

    def __init__(self, n_threads: int, stop: Callable[[], None]) -> None:
        """stop: ends the plan of these threads after the row under way."""
        self.block = control_block(n_threads)
        self.block[MEMBERS] = n_threads
        self._stop = stop
        self._error: BaseException | None = None
        self._act: Callable[[int], bool] = lambda number: True
        self._called = _Callback(self._call)
        self.block[HOST] = ctypes.cast(self._called, ctypes.c_void_p).value or 0

    def begin(self, act: Callable[[int], bool]) -> None:
        """A step begins: `act` is called with the number of each meeting, from 1.

        The step ends where that returns False or raises an error.
        """
        self._act, self._error = act, None
        self.block[[CONTROL["arrivals"], OVER, ABORT]] = 0

    def end(self) -> None:
        """The step has ended: the error that ended it."""
        if self._error is not None:
            raise self._error

    def _call(self, number: int, *_: int) -> int:
        go_on = False
        try:
            go_on = self._act(number)
        except BaseException as error:  # ctypes would print it and go on
            self._error = error
        if not go_on:
            self.block[ABORT] = 1
            self._stop()
        return 0


class Apart(Exchange):
    """The memory of such a program, and what is sent at its meetings."""

    def __init__(
        self, plan: Plan, device: int, devices: int, meeting: Meeting, threads: int,
        all_to_all: AllToAll,
    ) -> None:  # fmt: skip
        self._device, self._devices, self._all_to_all = device, devices, all_to_all
        self._received = aligned(max((devices * _room(node) for node in _sums(plan)), default=0))
        super().__init__([plan], lambda _, nbytes: aligned(nbytes), meeting.block, [threads])
        self._acts = [act for call in plan.calls() if call.meets for act in self._of(call)]
        self._live: Mapping[str, int] = {}

    def begin(self, live: Mapping[str, int]) -> Callable[[int], bool]:
        """What to do at the meetings of a step of so many rows."""
        self._live = live
        return self._act

    def _act(self, number: int) -> bool:
        return self._acts[number - 1]()

    def _of(self, call: Call) -> list[Act]:
        """What is done at each meeting of a call."""
        node = call.node
        if "parts" in call.arguments:
            part = call.arguments["x"]
            mine = self._bytes(part) if isinstance(part, Ref) else aligned(0)
            twice = "member" in call.arguments
            return [lambda: self._sum(node, mine), *([_alone] if twice else [])]
        (whole,) = call.writes[:1]
        return [lambda: self._gather(node, self.memory(0, whole))]

    def _bytes(self, ref: Ref) -> np.ndarray:
        return self.memory(0, ref.buffer)[ref.offset :]

    def _sum(self, node: Tensor, mine: np.ndarray) -> bool:
        nbytes = 4 * node.size // max(1, _rows(node)) * self._count(node)
        holders, room = node.attrs["holders"], _room(node)
        counts = [nbytes if d in holders else 0 for d in range(self._devices)]
        starts = [room * d for d in range(self._devices)]
        return self._all_to_all(mine[: counts[self._device]], counts, self._received, starts)

    def _gather(self, node: Tensor, memory: np.ndarray) -> bool:
        shape = [int(n) for n in node.shape]
        whole = memory[: 4 * math.prod(shape)].view(np.float32).reshape(shape)
        axis, runs, repeat = (node.attrs[name] for name in ("axis", "runs", "repeat"))
        rows = whole[: self._count(node)] if axis else whole
        firsts = tuple((owners[:1], n) for owners, n in runs)
        masks = Split(axis, firsts, repeat).masks()
        own = [np.flatnonzero(masks >> d & 1) for d in range(self._devices)]
        sizes = [rows.size // max(1, rows.shape[axis]) * len(at) * 4 for at in own]
        starts = np.cumsum([0, *sizes]).tolist()
        found = np.empty(starts[-1], np.uint8)
        mine = np.ascontiguousarray(rows.take(own[self._device], axis)).reshape(-1)
        if not self._all_to_all(mine.view(np.uint8), sizes, found, starts[:-1]):
            return False
        for d, at in enumerate(own):
            if d != self._device and len(at):
                index = (*(slice(None),) * axis, at)
                part = found[starts[d] : starts[d + 1]].view(np.float32)
                rows[index] = part.reshape(rows[index].shape)
        return True

    def _count(self, node: Tensor) -> int:
        """Live rows of a result."""
        first = node.shape[0] if node.ndim else 1
        return self._live.get(getattr(first, "name", ""), int(first))

    def _addresses(self, plans: Sequence[Plan]) -> dict[str, np.ndarray]:
        start = self._received.ctypes.data
        return {
            f"parts {node.attrs['number']}": np.array(
                [start + _room(node) * d for d in node.attrs["holders"]], np.int64
            )
            for node in _sums(plans[0])
        }


def _sums(plan: Plan) -> list[Tensor]:
    return [call.node for call in plan.calls() if "parts" in call.arguments]


def _room(node: Tensor) -> int:
    return -(-node.nbytes // ALIGNMENT) * ALIGNMENT


def _rows(node: Tensor) -> int:
    return int(node.shape[0]) if node.ndim else 1


def _alone() -> bool:
    """A meeting of this device's threads alone."""
    return True


def memory_of(apart: Apart) -> Callable[[Buffer], np.ndarray]:
    """As a program asks for it."""
    return lambda buffer: apart.memory(0, buffer)
