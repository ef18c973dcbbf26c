"""Finding special tokens in a text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping


class SpecialTokens:
    """The tokens of a vocabulary that are matched as written, before all else.

    `find` cuts a text into plain pieces and token ids. Matches go from left to right, the
    longest token first.
    """

    def __init__(self, ids: Mapping[str, int]):
        self._ids = {text: i for text, i in ids.items() if text}
        lengths: dict[str, set[int]] = {}
        for text in self._ids:
            lengths.setdefault(text[0], set()).add(len(text))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        firsts = "".join(re.escape(c) for c in self._lengths)
        self._candidate = re.compile(f"[{firsts}]") if firsts else None

    def find(self, text: str) -> Iterator[str | int]:
        """The pieces of `text` in order: a str is plain text (never empty), an int an id."""
        start = at = 0
        while self._candidate and (candidate := self._candidate.search(text, at)):
            at = candidate.start()
            found = self._match(text, at)
            if found is None:
                at += 1
                continue
            if at > start:
                yield text[start:at]
            yield self._ids[found]
            start = at = at + len(found)
        if start < len(text):
            yield text[start:]

    def _match(self, text: str, at: int) -> str | None:
        for length in self._lengths[text[at]]:
            piece = text[at : at + length]
            if piece in self._ids:
                return piece
        return None
