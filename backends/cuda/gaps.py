"""How long a GPU had nothing to do between steps: events around the launches of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

from runtime.backends.cuda.launcher import Device, Event, Stream


class Gaps:
    """Between the steps of one device; nothing is measured outside of `watched`."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._events: list[tuple[Event, Event]] | None = None

    @contextmanager
    def watched(self, stream: Stream) -> Iterator[list[float]]:
        """A list that at the end has the seconds from each step's last launch to the next's first.

        What a step is given is copied in that time. NaN from a driver without a GPU.
        """
        found: list[float] = []
        self._events = []
        try:
            yield found
            stream.synchronize()
            found += [start.since(end) for (_, end), (start, _) in pairwise(self._events)]
        finally:
            for event in [event for pair in self._events for event in pair]:
                event.close()
            self._events = None

    @contextmanager
    def around(self, stream: Stream) -> Iterator[None]:
        """The launches of a step."""
        if self._events is None:
            yield
            return
        pair = self._device.event(), self._device.event()
        pair[0].record(stream)
        yield
        pair[1].record(stream)
        self._events.append(pair)
