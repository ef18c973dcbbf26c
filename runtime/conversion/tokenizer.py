"""`tokenizer.*` metadata of a checkpoint."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtime.conversion import pretokenizer, sentencepiece
from runtime.conversion.added import Added
from runtime.conversion.checkpoint import Checkpoint
from runtime.conversion.config import Config
from runtime.conversion.special import special_keys
from runtime.ops.errors import TextError, shown
from runtime.text.pretokenize import PRE_TOKENIZERS
from runtime.text.special_ids import CONTROL, NORMAL, UNUSED, USER_DEFINED
from runtime.text.tokenizer import Tokenizer

# parts of tokens; the library takes the process down where they do not fit the vocabulary
_NOT_IN_FILES = ("continuing_subword_prefix", "end_of_word_suffix")
_SMALL_LLAMA = 49152  # rows of the vocabulary of models that want no BOS


def tokenizer_keys(checkpoint: Checkpoint, config: Config, llama: bool) -> dict[str, Any]:
    """All keys, in order; `llama` models say a few more things. TextError: it cannot be used."""
    path = checkpoint.folder / "tokenizer.json"
    spec, settings = checkpoint.json(path.name), checkpoint.json("tokenizer_config.json") or {}
    original = None if spec is None else _original(path, spec)
    found: dict[str, Any] = {}
    if llama and settings.get("add_prefix_space") is not None:
        found["tokenizer.ggml.add_space_prefix"] = bool(settings["add_prefix_space"])
    rows = config.size("vocab_size")
    pieces = sentencepiece.read(checkpoint, spec, rows)
    merges: list[str] = []
    if pieces is not None:
        found |= sentencepiece.keys(pieces, Added.read(checkpoint, spec, settings), rows)
    elif spec is None:
        raise TextError(f"{checkpoint.folder}: no tokenizer.json and no tokenizer.model")
    else:
        made, merges = _bytepairs(checkpoint, spec, settings, rows)
        found |= made
    found |= special_keys(checkpoint, spec, settings, config, merges)
    if llama and rows == _SMALL_LLAMA:
        found["tokenizer.ggml.add_bos_token"] = False
    if pieces is None:
        _check(found, path, original)
    return found


def _bytepairs(
    checkpoint: Checkpoint, spec: Mapping[str, Any], settings: Mapping[str, Any], rows: int
) -> tuple[dict[str, Any], list[str]]:
    """Keys of a vocabulary in byte letters, and its merges."""
    path = checkpoint.folder / "tokenizer.json"
    model = spec.get("model") or {}
    if model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise TextError(
            f"{path}: a model of type {shown(model.get('type'))} is not converted; byte pairs "
            "(BPE) and SentencePiece's are"
        )
    merges = list(map(_merge, model.get("merges") or []))
    texts: list[str | None] = [None] * rows
    kinds = np.full(rows, NORMAL, np.int32)
    added = Added.read(checkpoint, spec, settings)
    for text, number in (*model["vocab"].items(), *added.ids()):
        if not 0 <= number < rows:
            raise TextError(
                f"{path}: token {shown(text)} has the id {number}, but config.json's vocab_size "
                f"is {rows}"
            )
        texts[number] = text
    for number, text, control in added:
        kinds[number] = CONTROL if control else USER_DEFINED
        texts[number] = text
    for number, text in enumerate(texts):
        if text is None:
            texts[number], kinds[number] = f"[PAD{number}]", UNUSED
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _way(spec, str(path)),
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": kinds,
    }, merges


def _merge(pair: Any) -> str:
    """A merge as files have it: two halves with a space between, none within."""
    return pair if isinstance(pair, str) else " ".join(h.replace(" ", "\u0120") for h in pair)


def _way(spec: Mapping[str, Any], label: str) -> str:
    """The best name of how words are cut, ignoring merges for whole words or not."""
    names = pretokenizer.names_of(spec, label)
    wanted = bool(spec["model"].get("ignore_merges"))
    for name in names:
        if PRE_TOKENIZERS[name].whole_words == wanted or _merges_make_all(spec):
            return name
    raise TextError(
        f"{label}: with ignore_merges = {wanted} and these words the model would read texts "
        f"differently than {', '.join(names)} do"
    )


def _merges_make_all(spec: Mapping[str, Any]) -> bool:
    """Whether every token comes from merges, so that looking words up first changes nothing."""
    from tokenizers import models

    vocabulary = spec["model"]["vocab"]
    halves = (_merge(m).partition(" ") for m in spec["model"].get("merges") or [])
    model = models.BPE(vocabulary, [(left, right) for left, _, right in halves])
    added = {token["content"] for token in spec.get("added_tokens") or []}
    return all(len(model.tokenize(text)) == 1 for text in vocabulary if text not in added)


def _original(path: Path, spec: Mapping[str, Any]) -> Any:
    """What the `tokenizers` library makes of a tokenizer.json, all of whose parts have the right
    shape then. TextError: it cannot be used."""
    from tokenizers import Tokenizer as Original

    model = spec.get("model")
    for key in _NOT_IN_FILES:
        if isinstance(model, Mapping) and model.get(key):
            raise TextError(f"{path}: {key} = {shown(model[key])} is not known to GGUF files")
    try:
        return Original.from_str(json.dumps(spec))
    except Exception as error:  # the library has no type of its own
        raise TextError(f"{path}: cannot be used ({error})") from None


def _check(keys: Mapping[str, Any], path: Path, original: Any) -> None:
    """TextError: the new tokenizer reads the probe differently than the checkpoint's own."""
    text = unicodedata.normalize("NFC", pretokenizer.PROBE)
    wanted = original.encode(text, add_special_tokens=False).ids
    found = Tokenizer(keys).encode(text, add_special=False)
    if found != wanted:
        at = next(_differences(found, wanted))
        raise TextError(
            f"{path}: the converted model would read texts differently (token {at} of a test "
            f"text), which its normalizer or pre_tokenizer asks for"
        )


def _differences(a: list[int], b: list[int]) -> Iterator[int]:
    yield from (i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1])
    yield min(len(a), len(b))
