"""Stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Iterable


class StopFilter:
    """Passes text on until a stop string is complete, and never shows any part of it.

    What may still become a stop string is held back. Of several stop strings the one that is
    complete first counts (the longest of those that end together), so that the text does not
    depend on how it was cut into pieces.
    """

    def __init__(self, stops: Iterable[str]):
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stop: str | None = None
        """The stop string that was met, or None."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met; everything after it is dropped."""
        return self.stop is not None

    def feed(self, text: str) -> str:
        """The text that is safe to show now; may be empty."""
        if self.stopped:
            return ""
        text = self._held + text
        met = [(start + len(s), start, s) for s in self._stops if (start := text.find(s)) >= 0]
        if met:
            _, start, self.stop = min(met)
            self._held = ""
            return text[:start]
        keep = len(text) - self._may_become_stop(text)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """What is still held back when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held

    def _may_become_stop(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(s) for s in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
