"""Stop strings in text that arrives in pieces."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import NamedTuple


class StopFilter:
    """Passes text on until a stop string is complete, and never shows any part of it.

    What may still become a stop string is held back. Of several stop strings the one that is
    complete first counts (the longest of those that end together), so that the text does not
    depend on how it was cut into pieces.

    Hidden text, that of control tokens, is never shown, and stop strings are found in it all the
    same: one is met where it stands in the visible text, or in the text with hidden pieces.
    """

    def __init__(self, stops: Iterable[str]):
        self._shown = _Search(stops)
        self._all: _Search | None = None  # with hidden text too, from the first piece of it on
        self._pieces: list[tuple[int, int]] = []  # hidden: place in the text of `_all`, length
        self._before = 0  # characters of hidden pieces that are done with
        self._held = ""
        self.stop: str | None = None
        """The stop string that was met, or None."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met; everything after it is dropped."""
        return self.stop is not None

    def feed(self, text: str, hidden: str = "") -> str:
        """The text that is safe to show now; may be empty. `hidden` comes after `text`."""
        if self.stopped:
            return ""
        begin = self._shown.length - len(self._held)
        met = self._find(text, hidden)
        self._held += text
        if met is not None:
            self.stop = met.stop
            shown, self._held = self._held[: met.start - begin], ""
            return shown
        safe = self._safe() - begin
        shown, self._held = self._held[:safe], self._held[safe:]
        return shown

    def flush(self) -> str:
        """What is still held back when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str, hidden: str) -> _Match | None:
        """The stop string that is complete now, its places counted in visible text."""
        if hidden and self._all is None:
            self._all = copy.copy(self._shown)
        found = [self._shown.feed(text)]
        if self._all is not None:
            found.append(self._visible(self._all.feed(text)))
            if hidden:
                self._pieces.append((self._all.length, len(hidden)))
                found.append(self._visible(self._all.feed(hidden)))
        return min((match for match in found if match), default=None)

    def _safe(self) -> int:
        """How many visible characters cannot be part of a stop string any more."""
        if self._all is None:
            return self._shown.safe
        while self._pieces and sum(self._pieces[0]) <= self._all.safe:
            self._before += self._pieces.pop(0)[1]
        return min(self._shown.safe, self._place(self._all.safe))

    def _visible(self, match: _Match | None) -> _Match | None:
        return match and _Match(self._place(match.end), self._place(match.start), match.stop)

    def _place(self, place: int) -> int:
        """A place in the text of `_all` as a place in the visible text."""
        inside = sum(min(length, max(0, place - at)) for at, length in self._pieces)
        return place - self._before - inside


class _Match(NamedTuple):
    """A stop string that stands from `start` to `end`; the least is the one that counts."""

    end: int
    start: int
    stop: str


class _Search:
    """Looks for stop strings in a growing text; keeps only what may become one."""

    def __init__(self, stops: Iterable[str]):
        self._stops = tuple(stop for stop in stops if stop)
        self._longest = max((len(s) for s in self._stops), default=1) - 1
        self._tail = ""
        self.length = 0

    @property
    def safe(self) -> int:
        """How many characters cannot be part of a stop string any more."""
        return self.length - len(self._tail)

    def feed(self, text: str) -> _Match | None:
        """The stop string that `text` completes first."""
        begin = self.safe
        text = self._tail + text
        self.length = begin + len(text)
        found = ((text.find(stop), stop) for stop in self._stops)
        met = [_Match(begin + at + len(s), begin + at, s) for at, s in found if at >= 0]
        self._tail = text[len(text) - self._may_become_stop(text) :]
        return min(met, default=None)

    def _may_become_stop(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(self._longest, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
