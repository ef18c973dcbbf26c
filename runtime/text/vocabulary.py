"""The vocabulary of a GGUF file: texts, kinds and special ids of its tokens.

Keys are those of the GGUF specification (`tokenizer.ggml.*`). Kinds are the values of
`tokenizer.ggml.token_type`; files without that key have plain tokens only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtime.ops.cached import cached_property
from runtime.ops.errors import TextError, shown
from runtime.text import special_ids
from runtime.text.special_ids import BYTE, CONTROL, NORMAL, UNKNOWN

ESCAPED_SPACE = "▁"

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Defaults:
    """What a kind of tokenizer assumes where the file says nothing."""

    bos: int | None = None
    eos: int | None = None
    unknown: int | None = None
    add_bos: bool = False
    add_eos: bool = False

    def ids(self, n_tokens: int) -> dict[str, int]:
        """name -> id for the ids that a vocabulary of `n_tokens` has."""
        given = {"bos": self.bos, "eos": self.eos, "unknown": self.unknown}
        return {name: i for name, i in given.items() if i is not None and i < n_tokens}


@dataclass
class Vocabulary:
    """Tokens of one file. `texts[i]` and `kinds[i]` (int32) belong to id `i`.

    `named`: ids by what the file calls them ("bos", "eos", "unknown", "padding", ...). `visible`:
    control tokens that are part of the text all the same. `suppressed`: tokens the file wants
    never to be chosen.
    """

    texts: Sequence[str]
    kinds: np.ndarray
    named: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    end_ids: frozenset[int]
    visible: frozenset[int]
    suppressed: frozenset[int]
    ids: Mapping[str, int] = field(repr=False)

    @classmethod
    def read(cls, metadata: Mapping[str, Any], defaults: Defaults) -> Vocabulary:
        """The vocabulary in `metadata`. Raises TextError naming a missing or malformed key."""
        texts = _texts(metadata)
        kinds = _kinds(metadata, texts)
        # the first of two equal texts wins, as ids of later ones could never be produced
        ids = dict(zip(reversed(texts), range(len(texts) - 1, -1, -1), strict=True))
        n = len(texts)
        listed = special_ids.listed_ids(metadata, "tokenizer.ggml.eos_token_ids", n)
        named = defaults.ids(n) | ({"eos": listed[0]} if listed else {})
        named |= special_ids.named_ids(metadata, n)
        end_ids = special_ids.end_ids(named, listed, ids)
        visible = special_ids.mark(kinds, named, ids, end_ids)
        suppressed = special_ids.listed_ids(metadata, "tokenizer.ggml.suppress_tokens", n)
        return cls(
            texts=texts,
            kinds=kinds,
            named=named,
            add_bos=_add(metadata, "bos", named, defaults.add_bos),
            add_eos=_add(metadata, "eos", named, defaults.add_eos),
            end_ids=frozenset(end_ids),
            visible=frozenset(visible),
            suppressed=frozenset(suppressed),
            ids=ids,
        )

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text."""
        return self.named.get("bos")

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text."""
        return self.named.get("eos")

    @property
    def unknown_id(self) -> int | None:
        """The token for what no other token covers."""
        return self.named.get("unknown")

    def of_kind(self, *kinds: int) -> list[int]:
        """Ids whose kind is one of `kinds`, ascending."""
        return np.flatnonzero(np.isin(self.kinds, kinds)).tolist()

    @cached_property
    def hidden(self) -> frozenset[int]:
        """Ids that steer the model and are no part of the text it shows."""
        return frozenset(self.of_kind(CONTROL, UNKNOWN)) - self.visible

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
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__len__"):
        raise TextError(f"{key} is {type(value).__name__}, not an array: convert the model again")
    return value


def strings(metadata: Mapping[str, Any], key: str, needed_for: str) -> Any:
    """`metadata[key]`, which has to be an array of strings. Raises TextError naming the key."""
    value = array(metadata, key, needed_for)
    some = value if isinstance(value, list | tuple) else value[:1]  # a file's are of one type
    if not all(isinstance(text, str) for text in some):
        raise TextError(f"{key} is not an array of strings: convert the model again")
    return value


def word(metadata: Mapping[str, Any], key: str) -> str | None:
    """`metadata[key]` as text, None where it is not set. Raises TextError otherwise."""
    value = metadata.get(key)
    if value is not None and not isinstance(value, str):
        raise TextError(f"{key} is {type(value).__name__}, not text: convert the model again")
    return value


def switch(metadata: Mapping[str, Any], key: str) -> bool | None:
    """`metadata[key]` as true or false, None where it is not set. Raises TextError otherwise."""
    value = metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, bool | np.bool_ | int | np.integer):
        raise TextError(f"{key} is {shown(value)}, not true or false: convert the model again")
    return bool(value)


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
    texts = list(strings(metadata, "tokenizer.ggml.tokens", "holds the vocabulary"))
    if not texts:
        raise TextError("tokenizer.ggml.tokens is empty: the file has no vocabulary")
    return texts


def _kinds(metadata: Mapping[str, Any], texts: list[str]) -> np.ndarray:
    if metadata.get("tokenizer.ggml.token_type") is None:
        return np.array([BYTE if byte_of(t) else NORMAL for t in texts], dtype=np.int32)
    return numbers(metadata, "tokenizer.ggml.token_type", "iu", len(texts)).astype(np.int32)


def numbers(metadata: Mapping[str, Any], key: str, kinds: str, n_tokens: int) -> np.ndarray:
    """The numbers under `key`, one for each token.

    `kinds`: the numpy kinds they may have ("iu": whole numbers). Raises TextError naming the key.
    """
    values = array(metadata, key, "belongs to this kind of vocabulary")
    try:
        found = np.array(values)
    except (TypeError, ValueError, OverflowError):
        raise TextError(f"{key} is not an array of numbers: convert the model again") from None
    if found.ndim != 1 or (found.size and found.dtype.kind not in kinds):
        what = "whole numbers" if kinds == "iu" else "numbers"
        raise TextError(f"{key} is not an array of {what}: convert the model again")
    if found.size != n_tokens:
        raise TextError(
            f"{key} has {found.size} entries for {n_tokens} tokens: convert the model again"
        )
    return found


def _add(metadata: Mapping[str, Any], name: str, named: Mapping[str, int], default: bool) -> bool:
    asked = switch(metadata, f"tokenizer.ggml.add_{name}_token")
    if asked and name not in named:
        raise TextError(
            f"tokenizer.ggml.add_{name}_token is true, but tokenizer.ggml.{name}_token_id is not "
            "set: convert the model again"
        )
    return name in named and (default if asked is None else asked)
