"""When each launch of a step ran, one by one between events; and all of them as one graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from runtime.backends.cuda.launcher import Device, Launch, Stream

_REPEATS = 20


@dataclass(frozen=True)
class Bar:
    """A launch: its kernel, what it computes, seconds from the step's begin to its own, and of it.

    Events before and after it are in its own seconds, in part.
    """

    kernel: str
    subject: str
    start: float
    seconds: float


@dataclass(frozen=True)
class Timeline:
    """A step's launches in order. replayed: seconds of all as a step runs them, in one graph."""

    bars: list[Bar]
    replayed: float

    @property
    def busy(self) -> float:
        """Seconds of all launches together."""
        return sum(bar.seconds for bar in self.bars)

    @property
    def gap(self) -> float:
        """Seconds between two launches of the replayed step, on average; less than 0 where they
        overlap, or where events cost more than launches apart."""
        return (self.replayed - self.busy) / max(1, len(self.bars) - 1)


def timeline(
    device: Device, stream: Stream, launches: Sequence[Launch], subjects: Sequence[str],
    replay: Callable[[], Any],
) -> Timeline:  # fmt: skip
    """Of launches whose step was given to the device; medians of 20 runs."""
    events = [(device.event(), device.event()) for _ in launches]
    runs: list[list[tuple[float, float]]] = []
    wholes: list[float] = []
    with device.event() as begin, device.event() as end:
        for _ in range(_REPEATS):
            begin.record(stream)
            for launch, (before, after) in zip(launches, events, strict=True):
                before.record(stream)
                launch.run(stream)
                after.record(stream)
            stream.synchronize()
            runs.append([(before.since(begin), after.since(before)) for before, after in events])
        for _ in range(_REPEATS):
            begin.record(stream)
            replay()
            end.record(stream)
            end.synchronize()
            wholes.append(end.since(begin))
    for event in [event for pair in events for event in pair]:
        event.close()
    bars = [
        Bar(str(launch.kernel), subject, *(median(values) for values in zip(*of, strict=True)))
        for launch, subject, *of in zip(launches, subjects, *runs, strict=True)
    ]
    return Timeline(bars, median(wholes))
