"""Finding special tokens in a text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from itertools import pairwise
from typing import Any

from runtime.text.special_ids import CONTROL, UNKNOWN, USER_DEFINED
from runtime.text.vocabulary import Vocabulary

_SPACES = " \t\n\v\f\r"
# architectures and pre-tokenizers of encoders
_MASKED = {
    *("nomic-bert-moe", "jina-bert-v3", "jina-v2-de", "jina-v2-es", "jina-v2-code", "mmbert"),
}


class SpecialTokens:
    """The tokens of a vocabulary that are matched as written, before all else.

    `find` cuts a text into plain pieces and token ids. Matches go from left to right, the
    longest token first. Tokens in `before` swallow the spaces before them, those in `after` the
    spaces after them.
    """

    def __init__(
        self,
        ids: Mapping[str, int],
        before: AbstractSet[int] = frozenset(),
        after: AbstractSet[int] = frozenset(),
    ):
        self._before, self._after = before, after
        self._ids = {text: i for text, i in ids.items() if text}
        lengths: dict[str, set[int]] = {}
        for text in self._ids:
            lengths.setdefault(text[0], set()).add(len(text))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        firsts = "".join(re.escape(c) for c in self._lengths)
        self._candidate = re.compile(f"[{firsts}]") if firsts else None

    def find(self, text: str) -> Iterator[str | int]:
        """The pieces of `text` in order: a str is plain text (never empty), an int an id."""
        pieces = self._cut(text)
        if not self._before and not self._after:
            return pieces
        found = list(pieces)
        for i, (left, right) in enumerate(pairwise(found)):
            if isinstance(left, str) and right in self._before:
                found[i] = left.rstrip(_SPACES)
            if isinstance(right, str) and left in self._after:
                found[i + 1] = right.lstrip(_SPACES)
        return (piece for piece in found if piece != "")

    def _cut(self, text: str) -> Iterator[str | int]:
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


def swallowing(
    metadata: Mapping[str, Any], known: Vocabulary
) -> tuple[frozenset[int], frozenset[int]]:
    """The special tokens that swallow the spaces (before, after) them.

    Phi-3's tokenizer and the masks of some encoders do; GGUF has no key for it, so names tell.
    """
    before: set[int] = set()
    after: set[int] = set()
    kinds = [metadata.get(key) for key in ("general.architecture", "tokenizer.ggml.pre")]
    if any(isinstance(kind, str) and kind in _MASKED for kind in kinds):
        before = {known.ids[text] for text in ("<mask>",) if text in known.ids}
    name = str(metadata.get("general.name", "")).lower()
    if "phi-3" in name or "phi3" in name:
        kept = {known.ids.get(text) for text in ("<unk>", "<s>", "<|endoftext|>")}
        after = set(known.of_kind(CONTROL, UNKNOWN, USER_DEFINED)) - kept
    return frozenset(before), frozenset(after)
