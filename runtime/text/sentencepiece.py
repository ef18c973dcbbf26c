"""SentencePiece vocabularies with scores: "llama" (merging by score) and "t5" (unigram).

Spaces are written `▁`. What no token covers is spelled in `<0xXX>` tokens, one for each byte of
its UTF-8 form, or becomes the unknown token where the vocabulary has none.

Merging (Kudo and Richardson 2018, arXiv:1808.06226): of all neighbours whose joined text is a
token, the pair with the highest score is joined first, the leftmost among equals. That is not a
list of ranked merges: which two halves made a token does not matter, only where they stand. So
the loop is written out here. Unigram (Kudo 2018, arXiv:1804.10959) is the Viterbi search of the
`tokenizers` library.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.ops.errors import TextError
from runtime.text.special_ids import BYTE, CONTROL, UNKNOWN, UNUSED
from runtime.text.vocabulary import ESCAPED_SPACE, Vocabulary, numbers

_WORD = re.compile(f"{ESCAPED_SPACE}*[^{ESCAPED_SPACE}]*")
_CACHED_WORD = 48  # characters; longer words hardly ever come twice
_CACHED_WORDS = 1 << 16


def scores(metadata: Mapping[str, Any], n_tokens: int) -> np.ndarray:
    """`tokenizer.ggml.scores` as float64 [n_tokens]. Raises TextError when they cannot be used."""
    found = numbers(metadata, "tokenizer.ggml.scores", "iuf", n_tokens).astype(np.float64)
    if np.isnan(found).any():
        raise TextError("tokenizer.ggml.scores holds NaN, which orders nothing: convert it again")
    return found


class MergeEncoder:
    """Text to ids by merging neighbours in the order of their score."""

    def __init__(self, vocabulary: Vocabulary, token_scores: np.ndarray, space_prefix: bool):
        self._spell = _speller(vocabulary)
        self._prefix = " " if space_prefix else ""
        # Control tokens must not arise from plain text, and bytes only spell.
        closed = set(vocabulary.of_kind(CONTROL, UNKNOWN, BYTE))
        self._ids = {t: i for t, i in vocabulary.ids.items() if i not in closed}
        self._costs = {t: -s for t, s in zip(vocabulary.texts, token_scores.tolist(), strict=True)}
        self._costs = {t: self._costs[t] for t in self._ids}
        # Nothing merges across a border of words unless a token has a space after a letter.
        joined = "\0".join(self._ids)
        across = re.search(f"[^{ESCAPED_SPACE}\0]{ESCAPED_SPACE}", joined)
        self._words: Callable[[str], list[str]] = (lambda t: [t]) if across else _WORD.findall
        self._cache: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in self._words((self._prefix + text).replace(" ", ESCAPED_SPACE)):
            found = self._cache.get(word)
            ids += self._encode_word(word) if found is None else found
        return ids

    def _encode_word(self, word: str) -> list[int]:
        ids: list[int] = []
        for part in merge(word, self._costs):
            token = self._ids.get(part)
            ids += self._spell(part) if token is None else [token]
        if len(word) <= _CACHED_WORD:
            if len(self._cache) >= _CACHED_WORDS:
                self._cache.clear()
            self._cache[word] = ids
        return ids


def merge(word: str, costs: Mapping[str, float]) -> list[str]:
    """Join neighbouring parts of `word` while their text is in `costs`, the cheapest first.

    Equal costs go from left to right. O(n log n) for n characters.
    """
    parts = list(word)
    n = len(parts)
    left_of = list(range(-1, n - 1))
    right_of = [*range(1, n), -1]
    queue: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        text = parts[left] + parts[right]
        cost = costs.get(text)
        if cost is not None:
            heapq.heappush(queue, (cost, left, right, text))

    for i in range(n - 1):
        offer(i, i + 1)
    while queue:
        _, left, right, text = heapq.heappop(queue)
        # stale when one side was merged meanwhile
        if not parts[right] or not parts[left] or len(parts[left]) + len(parts[right]) != len(text):
            continue
        parts[left], parts[right] = text, ""
        after = right_of[left] = right_of[right]
        if after >= 0:
            left_of[after] = left
            offer(left, after)
        if left_of[left] >= 0:
            offer(left_of[left], left)
    return [part for part in parts if part]


@dataclass(frozen=True)
class UnigramOptions:
    """How a "t5" vocabulary wants its text: see the keys of the same names in GGUF files."""

    add_space_prefix: bool
    remove_extra_whitespaces: bool
    charsmap: Callable[[str], str]


def unigram_encoder(
    vocabulary: Vocabulary, token_scores: np.ndarray, options: UnigramOptions
) -> Callable[[str], list[int]]:
    """A function from text to the most probable ids. Raises TextError on unusable metadata."""
    from tokenizers import Tokenizer, models

    if vocabulary.unknown_id is None:
        raise TextError("tokenizer.ggml.unknown_token_id is not set, and unigrams need it")
    tokenizer = Tokenizer(models.Unigram(_pieces(vocabulary, token_scores), vocabulary.unknown_id))
    normalise = _normaliser(options)
    spell = _speller(vocabulary)
    unknown = vocabulary.unknown_id

    def encode(text: str) -> list[int]:
        text = normalise(text)
        encoding = tokenizer.encode(text, add_special_tokens=False)
        if not vocabulary.byte_ids or unknown not in encoding.ids:
            return encoding.ids
        ids: list[int] = []
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            ids += spell(text[start:end]) if token == unknown else [token]
        return ids

    return encode


def _pieces(vocabulary: Vocabulary, token_scores: np.ndarray) -> list[tuple[str, float]]:
    closed = np.isin(vocabulary.kinds, (CONTROL, UNKNOWN, BYTE, UNUSED))
    lowest = float(token_scores[~closed].min(initial=0.0))
    # Texts that cannot come up: `_normaliser` lets no noncharacter through.
    return [
        (f"\uffff{i}", lowest) if shut else (text, score)
        for i, (text, score, shut) in enumerate(
            zip(vocabulary.texts, token_scores.tolist(), closed.tolist(), strict=True)
        )
    ]


def _normaliser(options: UnigramOptions) -> Callable[[str], str]:
    def normalise(text: str) -> str:
        text = options.charsmap(text.replace("\uffff", "\ufffd"))
        if options.remove_extra_whitespaces:
            return "".join(ESCAPED_SPACE + word for word in text.split(" ") if word)
        body = text.lstrip(" ")
        prefix = " " if options.add_space_prefix and body else ""
        return (text[: len(text) - len(body)] + prefix + body).replace(" ", ESCAPED_SPACE)

    return normalise


def _speller(vocabulary: Vocabulary) -> Callable[[str], Sequence[int]]:
    byte_ids = vocabulary.byte_ids
    unknown = [] if vocabulary.unknown_id is None else [vocabulary.unknown_id]

    def spell(text: str) -> Sequence[int]:
        try:
            return [byte_ids[b] for b in text.encode()]
        except KeyError:
            return unknown

    return spell
