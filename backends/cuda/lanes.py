"""The state of simulated threads: who is running, where each waits, and how they meet.

Each lane (thread) is a greenlet. It runs until it must wait for others: at a block's barrier, or
in an operation of its warp such as a shuffle. `simulator.py` decides who runs next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime.ops.errors import BackendError

WARP = 32
Meeting = Callable[[Sequence["Lane"], Sequence[Any]], Sequence[Any]]


@dataclass
class Block:
    """The threads of one block, and what they share."""

    index: tuple[int, int, int]
    grid: tuple[int, int, int]
    threads: int
    memory: Any = None  # memory.SharedMemory
    dynamic: tuple[int, int] = (0, 0)  # address and bytes of its dynamic part
    epoch: int = 0  # barriers passed
    epochs: list[int] = field(default_factory=list)  # by warp: synchronisations of the warp


@dataclass(eq=False)
class Lane:
    """One simulated thread."""

    thread: int
    block: Block
    greenlet: Any = None
    waits: tuple[Any, ...] | None = None  # ("block" or "warp", meeting, value)
    result: Any = None
    done: bool = False
    pending: list[Any] = field(default_factory=list)  # copies begun, in no group yet
    groups: list[list[Any]] = field(default_factory=list)  # committed groups of copies

    @property
    def lane(self) -> int:
        """Its number within the warp, 0 to 31."""
        return self.thread % WARP

    @property
    def warp(self) -> int:
        """The number of its warp within the block."""
        return self.thread // WARP

    def __repr__(self) -> str:
        return f"thread {self.thread} of block {self.block.index}"


_running: list[Lane] = []


def current() -> Lane:
    """The lane that is running. BackendError outside of a simulation."""
    if not _running:
        raise BackendError("this operation of a kernel means something only inside a launch")
    return _running[-1]


def run(lane: Lane) -> None:
    """Let a lane go on until it waits or ends."""
    _running.append(lane)
    try:
        lane.greenlet.switch()
    finally:
        _running.pop()
    lane.done = lane.greenlet.dead


def meet_warp(meeting: Meeting, value: Any) -> Any:
    """Wait for all lanes of the warp at the same operation; `meeting` gives each its result."""
    return _wait("warp", meeting, value)


def meet_block(meeting: Meeting) -> Any:
    """Wait for every thread of the block."""
    return _wait("block", meeting, None)


def _wait(*what: Any) -> Any:
    lane = current()
    lane.waits = what
    lane.greenlet.parent.switch()
    return lane.result


def release(lanes: Sequence[Lane]) -> None:
    """All have arrived: give each its result."""
    assert lanes[0].waits is not None, "only waiting lanes are released"
    meeting = lanes[0].waits[1]
    results = meeting(lanes, [lane.waits[2] for lane in lanes if lane.waits])
    for lane, result in zip(lanes, results, strict=True):
        lane.result, lane.waits = result, None


def place(lane: Lane) -> str:
    """Where a lane waits, for messages."""
    return f"{lane} waits at {_name(lane.waits[1])}" if lane.waits else f"{lane} runs"


def _name(meeting: Meeting) -> str:
    return getattr(meeting, "__name__", str(meeting)).strip("_")
