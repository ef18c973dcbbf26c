"""What happened before what among streams, by vector clocks (Fidge 1988, Mattern 1989).

Each stream counts its work and knows how far into every other stream's its own is behind. Work is
ordered behind other work when its stream knows of it: through an event, or because the host waited.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from fake_memory import Span, overlap

from runtime.ops.errors import BackendError

Clock = dict[Hashable, int]


@dataclass
class _Access:
    span: Span
    stream: Hashable
    time: int
    name: str


class Order:
    """The work of all streams so far, as far as later work can still collide with it."""

    def __init__(self) -> None:
        self._clocks: dict[Hashable, Clock] = {}
        self._events: dict[Hashable, Clock] = {}
        self._host: Clock = {}
        self._history: list[_Access] = []

    def add(self, stream: Hashable, touched: list[Span], name: str) -> None:
        """New work of a stream. BackendError: it may run beside work whose bytes it touches."""
        clock = self._clocks.setdefault(stream, {})
        _join(clock, self._host)
        for old in self._history:
            if clock.get(old.stream, 0) < old.time and overlap([old.span], touched):
                raise BackendError(
                    f"fake driver: {name} on {stream} is not ordered behind {old.name} on "
                    f"{old.stream}, and one writes what the other uses: wait for an event"
                )
        clock[stream] = time = clock.get(stream, 0) + 1
        self._history = [h for h in self._history if not _superseded(h, touched, stream)]
        self._history += [_Access(span, stream, time, name) for span in dict.fromkeys(touched)]

    def record(self, event: Hashable, stream: Hashable) -> None:
        """The event stands behind the stream's work so far."""
        clock = self._clocks.setdefault(stream, {})
        _join(clock, self._host)
        self._events[event] = dict(clock)

    def wait(self, stream: Hashable, event: Hashable) -> None:
        """The stream's later work stands behind the event; one never recorded holds nothing up."""
        _join(self._clocks.setdefault(stream, {}), self._events.get(event, {}))

    def synchronize(self, stream: Hashable) -> None:
        """The host waited for the stream: all later work is behind its work."""
        _join(self._host, self._clocks.get(stream, {}))

    def synchronize_event(self, event: Hashable) -> None:
        """The host waited for the event."""
        _join(self._host, self._events.get(event, {}))

    def happened(self, *events: Hashable) -> None:
        """BackendError: one was never recorded, or the host has not waited for it."""
        for event in events:
            if event not in self._events:
                raise BackendError(f"fake driver: {event} was never recorded")
            known = self._events[event].items()
            if any(self._host.get(stream, 0) < time for stream, time in known):
                raise BackendError(f"fake driver: {event} was not waited for")

    def now(self, stream: Hashable) -> int:
        """How much work the stream was given."""
        return self._clocks.get(stream, {}).get(stream, 0)

    def waited(self, stream: Hashable, time: int) -> bool:
        """Whether the host waited for so much of a stream's work."""
        return self._host.get(stream, 0) >= time

    def forget(self, start: int, end: int) -> None:
        """Bytes were freed."""
        self._history = [h for h in self._history if h.span.end <= start or end <= h.span.start]


def _join(clock: Clock, other: Clock) -> None:
    for stream, time in other.items():
        clock[stream] = max(time, clock.get(stream, 0))


def _superseded(old: _Access, touched: list[Span], stream: Hashable) -> bool:
    """Whether new work, ordered behind the old, covers all that could collide with it later."""
    return any(
        new.start <= old.span.start
        and old.span.end <= new.end
        and (new.writes or (old.stream == stream and not old.span.writes))
        for new in touched
    )
