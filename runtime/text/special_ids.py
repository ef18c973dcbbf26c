"""Tokens with a meaning: ids that a file names, end tokens, and marks known by their text.

Many files do not name every token that ends an answer, or give it the kind of a plain word. So
well-known texts count too, as in llama.cpp. Of fill-in-the-middle tokens a file has one for each
purpose: the one it names, else ONE found by its text (that with the highest id where there are
several), because the others are plain tokens of other families.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from runtime.ops.errors import TextError, shown

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# They end an answer in some model family: chat turns, tool calls, ends of documents.
_END_TEXTS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>"),
    *("<end_of_turn>", "<turn|>", "<|tool_response>", "<|endoftext|>", "<|end_of_text|>"),
    *("<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "</s>", "<eos>", "[e~["),
    *("<end_of_utterance>", "<\uff5cend▁of▁sentence\uff5c>"),
)
_END_KEYS = ("eos", "eot", "eom")
_ID_KEY = re.compile(r"tokenizer\.ggml\.(.+)_token_id")
_OLD_NAMES = {"prefix": "fim_pre", "suffix": "fim_suf", "middle": "fim_mid"}
# Fill-in-the-middle padding and file borders: nothing that follows belongs to the answer.
_FIM_ENDS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
_FIM_PARTS = {
    "fim_pre": (
        *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<\uff5cfim▁begin\uff5c>"),
        *("<PRE>", "▁<PRE>", "<|code_prefix|>", "<|prefix|>"),
    ),
    "fim_suf": (
        *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<\uff5cfim▁hole\uff5c>"),
        *("<SUF>", "▁<SUF>", "<|code_suffix|>", "<|suffix|>"),
    ),
    "fim_mid": (
        *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<\uff5cfim▁end\uff5c>"),
        *("<MID>", "▁<MID>", "<|code_middle|>", "<|middle|>"),
    ),
}
# Marks of the harmony format steer the model and are part of the visible text all the same.
_VISIBLE_TEXTS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


def named_ids(metadata: Mapping[str, Any], n_tokens: int) -> dict[str, int]:
    """name -> id for every `tokenizer.ggml.<name>_token_id`.

    An id outside the vocabulary counts as none, with a warning: files with a padding id of -1
    run well. Raises TextError for what is no whole number.
    """
    found = {}
    for key, value in metadata.items():
        match = _ID_KEY.fullmatch(key)
        token = _checked(key, value, n_tokens) if match else None
        if match and token is not None:
            found[_OLD_NAMES.get(match[1], match[1])] = token
    return found


def listed_ids(metadata: Mapping[str, Any], key: str, n_tokens: int) -> list[int]:
    """The ids in the array `metadata[key]`, checked as by `named_ids`."""
    values = metadata.get(key)
    if values is None:
        return []
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        values = [values]
    found = (_checked(key, value, n_tokens) for value in values)
    return [i for i in found if i is not None]


def _checked(key: str, value: Any, n_tokens: int) -> int | None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise TextError(f"{key} is {shown(value)}, not a token id: convert the model again")
    if 0 <= value < n_tokens:
        return int(value)
    warnings.warn(
        f"{key} = {value} is outside the vocabulary of {n_tokens} and is not used",
        stacklevel=2,
    )
    return None


def end_ids(named: Mapping[str, int], listed: list[int], ids: Mapping[str, int]) -> set[int]:
    """All ids that end an answer.

    `named`: name -> id, the default end token among them; `listed`: further end tokens of the
    file; `ids`: text -> id.
    """
    ends = {named.get(name) for name in _END_KEYS}
    ends |= {named.get(name, _by_text(texts, ids)) for name, texts in _FIM_ENDS.items()}
    ends |= {ids.get(text) for text in _END_TEXTS}
    ends -= {ids.get(text) for text in _not_ends(ids, ends)}
    return {i for i in ends if i is not None} | set(listed)


def _by_text(texts: tuple[str, ...], ids: Mapping[str, int]) -> int | None:
    return max((ids[text] for text in texts if text in ids), default=None)


def _not_ends(ids: Mapping[str, int], ends: set[int | None]) -> list[str]:
    """Texts that end answers elsewhere but not in this family.

    Where turns end by return, call or flush tokens, `<|end|>` only ends a channel; where tool
    responses end a turn, and in PLaMo, `</s>` is an HTML tag.
    """

    def has(*texts: str) -> bool:
        return any(t in ids and ids[t] in ends for t in texts)

    channels = has("<|call|>", "<|calls|>") and has("<|return|>", "<|flush|>")
    tags = has("<|tool_response>", "<|plamo:eos|>")
    return ["<|end|>"] * channels + ["</s>"] * tags


def mark(
    kinds: np.ndarray, named: Mapping[str, int], ids: Mapping[str, int], ends: set[int]
) -> set[int]:
    """Give tokens known by their text the kind that careless conversions forget.

    Changes `kinds`, int32 [tokens]. Returns the control tokens that are part of the visible text.
    """
    visible = {ids[t] for t in _VISIBLE_TEXTS if t in ids}
    if "<|end|>" in ids and ids["<|end|>"] not in ends:
        visible.add(ids["<|end|>"])
    control = visible | {ids[t] for t in _END_TEXTS if t in ids}
    fim = [texts for name, texts in (_FIM_ENDS | _FIM_PARTS).items() if name not in named]
    control |= {i for texts in fim if (i := _by_text(texts, ids)) is not None}
    for i in control:
        if kinds[i] != UNKNOWN:
            kinds[i] = CONTROL
    if "</s>" in ids and ids["</s>"] not in ends:
        kinds[ids["</s>"]] = NORMAL
    return visible
