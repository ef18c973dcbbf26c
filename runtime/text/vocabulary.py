"""The vocabulary of a GGUF file: texts, kinds and special ids of its tokens.

Keys are those of the GGUF specification (`tokenizer.ggml.*`). Kinds are the values of
`tokenizer.ggml.token_type`; files without that key have plain tokens only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from runtime.ops.errors import TextError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
ESCAPED_SPACE = "▁"

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# Tokens that end an answer in some model family, found by text because many files do not
# name them: chat turns (eot), tool calls (eom) and ends of documents.
_END_TEXTS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>"),
    *("<end_of_turn>", "<turn|>", "<|tool_response>", "<|endoftext|>", "<|end_of_text|>"),
    *("<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "</s>", "<eos>", "[e~["),
    *("<end_of_utterance>", "<\uff5cend▁of▁sentence\uff5c>"),
    # fill-in-the-middle padding and file borders: nothing that follows belongs to the answer
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|file_sep|>"),
    *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
)
# Channel marks of the harmony format are part of the visible text.
_VISIBLE_TEXTS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
_END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")


@dataclass(frozen=True)
class Defaults:
    """What a kind of tokenizer assumes where the file says nothing."""

    bos: int | None = None
    eos: int | None = None
    unknown: int | None = None
    add_bos: bool = False
    add_eos: bool = False


@dataclass
class Vocabulary:
    """Tokens of one file. `texts[i]` and `kinds[i]` (int32) belong to id `i`."""

    texts: Sequence[str]
    kinds: np.ndarray
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    add_bos: bool
    add_eos: bool
    end_ids: frozenset[int]
    ids: Mapping[str, int] = field(repr=False)

    @classmethod
    def read(cls, metadata: Mapping[str, Any], defaults: Defaults) -> Vocabulary:
        """The vocabulary in `metadata`. Raises TextError naming a missing or malformed key."""
        texts = _texts(metadata)
        kinds = _kinds(metadata, texts)
        # the first of two equal texts wins, as ids of later ones could never be produced
        ids = dict(zip(reversed(texts), range(len(texts) - 1, -1, -1), strict=True))
        end_ids = _end_ids(metadata, ids, len(texts))
        bos = _special_id(metadata, "bos", len(texts), defaults.bos)
        eos = _special_id(metadata, "eos", len(texts), defaults.eos)
        if eos is not None:
            end_ids |= {eos}
        not_ends = _not_ends(ids, end_ids)
        end_ids -= not_ends
        _mark_special(kinds, ids, end_ids, not_ends)
        return cls(
            texts=texts,
            kinds=kinds,
            bos_id=bos,
            eos_id=eos,
            unknown_id=_special_id(metadata, "unknown", len(texts), defaults.unknown),
            add_bos=_add(metadata, "bos", bos, defaults.add_bos),
            add_eos=_add(metadata, "eos", eos, defaults.add_eos),
            end_ids=frozenset(end_ids),
            ids=ids,
        )

    def __len__(self) -> int:
        return len(self.texts)

    def of_kind(self, *kinds: int) -> list[int]:
        """Ids whose kind is one of `kinds`, ascending."""
        return np.flatnonzero(np.isin(self.kinds, kinds)).tolist()

    @cached_property
    def byte_ids(self) -> dict[int, int]:
        """byte value -> id of its `<0xXX>` token, for the bytes that have one."""
        found = ((_BYTE_TOKEN.fullmatch(self.texts[i]), i) for i in self.of_kind(BYTE))
        return {int(match[1], 16): i for match, i in found if match}


def byte_of(text: str) -> bytes | None:
    """The byte that a `<0xXX>` token stands for, or None when `text` is no such token."""
    match = _BYTE_TOKEN.fullmatch(text)
    return bytes([int(match[1], 16)]) if match else None


def array(metadata: Mapping[str, Any], key: str, needed_for: str) -> Any:
    """`metadata[key]`, which has to be an array. Raises TextError naming the key."""
    value = metadata.get(key)
    if value is None:
        raise TextError(f"the file has no {key}, which {needed_for}: convert the model again")
    if isinstance(value, str) or not hasattr(value, "__len__"):
        raise TextError(f"{key} is {type(value).__name__}, not an array: convert the model again")
    return value


def normal_forms(metadata: Mapping[str, Any]) -> list[str]:
    """Unicode normal forms ("NFC") the file asks for, in order; nearly always none.

    Only the `tokenizer.huggingface.json` that some files carry can ask. Raises TextError when
    that is no JSON.
    """
    source = metadata.get("tokenizer.huggingface.json")
    if not isinstance(source, str):
        return []
    try:
        steps = [json.loads(source).get("normalizer") or {}]
    except (ValueError, AttributeError):
        raise TextError("tokenizer.huggingface.json is no JSON object") from None
    steps += steps[0].get("normalizers", [])
    return [s["type"] for s in steps if s.get("type") in ("NFC", "NFD", "NFKC", "NFKD")]


def _texts(metadata: Mapping[str, Any]) -> list[str]:
    texts = list(array(metadata, "tokenizer.ggml.tokens", "holds the vocabulary"))
    if not texts:
        raise TextError("tokenizer.ggml.tokens is empty: the file has no vocabulary")
    if not isinstance(texts[0], str):
        raise TextError("tokenizer.ggml.tokens is not an array of strings: convert the model again")
    return texts


def _kinds(metadata: Mapping[str, Any], texts: list[str]) -> np.ndarray:
    given = metadata.get("tokenizer.ggml.token_type")
    if given is None:
        return np.array([BYTE if byte_of(t) else NORMAL for t in texts], dtype=np.int32)
    try:
        kinds = np.array(given, dtype=np.int32)
    except (TypeError, ValueError, OverflowError):
        raise TextError("tokenizer.ggml.token_type is not an array of small integers") from None
    if kinds.shape != (len(texts),):
        raise TextError(
            f"tokenizer.ggml.token_type has {kinds.size} entries for {len(texts)} tokens: "
            "convert the model again"
        )
    return kinds


def _special_id(
    metadata: Mapping[str, Any], name: str, n_tokens: int, default: int | None = None
) -> int | None:
    """The id under `tokenizer.ggml.<name>_token_id`; ids outside the vocabulary do not count."""
    for value in (metadata.get(f"tokenizer.ggml.{name}_token_id"), default):
        if isinstance(value, int | np.integer) and 0 <= value < n_tokens:
            return int(value)
    return None


def _add(metadata: Mapping[str, Any], name: str, token: int | None, default: bool) -> bool:
    asked = metadata.get(f"tokenizer.ggml.add_{name}_token")
    if asked and token is None:
        raise TextError(
            f"tokenizer.ggml.add_{name}_token is true, but tokenizer.ggml.{name}_token_id is not "
            "set: convert the model again"
        )
    return token is not None and bool(default if asked is None else asked)


def _end_ids(metadata: Mapping[str, Any], ids: Mapping[str, int], n_tokens: int) -> set[int]:
    named = {_special_id(metadata, name, n_tokens) for name in _END_KEYS}
    return {i for i in named if i is not None} | {ids[t] for t in _END_TEXTS if t in ids}


def _not_ends(ids: Mapping[str, int], end_ids: set[int]) -> set[int]:
    """Tokens that end answers elsewhere but not in this family.

    Where turns end by return, call or flush tokens, `<|end|>` only ends a channel; where tool
    responses end a turn, `</s>` is an HTML tag.
    """

    def ends(*texts: str) -> bool:
        return any(ids.get(t) in end_ids for t in texts)

    texts = []
    if ends("<|call|>", "<|calls|>") and ends("<|return|>", "<|flush|>"):
        texts.append("<|end|>")
    if ends("<|tool_response>"):
        texts.append("</s>")
    return {ids[t] for t in texts if t in ids}


def _mark_special(
    kinds: np.ndarray, ids: Mapping[str, int], end_ids: set[int], not_ends: set[int]
) -> None:
    """Give tokens known by their text the kind that careless conversions forget."""
    for i in end_ids:
        if kinds[i] != UNKNOWN:
            kinds[i] = CONTROL
    visible = {ids[t] for t in _VISIBLE_TEXTS if t in ids} | (not_ends & {ids.get("<|end|>")})
    for i in visible:
        kinds[i] = USER_DEFINED
