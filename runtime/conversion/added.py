"""Tokens that were added to a vocabulary: control tokens, and texts that are always one token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from runtime.conversion.checkpoint import Checkpoint
from runtime.ops.errors import TextError, shown
from runtime.text.vocabulary import ESCAPED_SPACE

# They are control tokens, whatever the file says.
_CONTROL_TEXTS = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_CONTROL_ENDS = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))


@dataclass(frozen=True)
class Added:
    """Added tokens: iterated as (id, text, whether it is a control token), by id."""

    _tokens: dict[int, tuple[str, bool]]

    @staticmethod
    def read(
        checkpoint: Checkpoint, spec: Mapping[str, Any] | None, settings: Mapping[str, Any]
    ) -> Added:
        """From tokenizer.json (`spec`) and tokenizer_config.json (`settings`), or, of older
        checkpoints, from added_tokens.json."""
        listed = [(token.get("id"), token) for token in (spec or {}).get("added_tokens") or []]
        known = {str(number) for number, _ in listed}
        decoder = settings.get("added_tokens_decoder") or {}
        if isinstance(decoder, Mapping):
            listed += [(_whole(n), token) for n, token in decoder.items() if n not in known]
        if not listed:
            plain = checkpoint.json("added_tokens.json") or {}
            listed = [(number, {"content": text}) for text, number in plain.items()]
        found: dict[int, tuple[str, bool]] = {}
        for number, token in listed:
            text = token.get("content") if isinstance(token, Mapping) else None
            if type(number) is not int or number < 0 or not isinstance(text, str):
                raise TextError(
                    f"{checkpoint.folder}: the added token {shown(token)} has no usable id and text"
                )
            found[number] = text, bool(token.get("special")) or _looks_like_control(text)
        return Added(dict(sorted(found.items())))

    def ids(self) -> list[tuple[str, int]]:
        """(text, id) of all."""
        return [(text, number) for number, (text, _) in self._tokens.items()]

    def __iter__(self) -> Iterator[tuple[int, str, bool]]:
        for number, (text, control) in self._tokens.items():
            yield number, text if control else text.replace(ESCAPED_SPACE, " "), control


def _whole(digits: str) -> int:
    return int(digits) if digits.isdecimal() else -1


def _looks_like_control(text: str) -> bool:
    return text in _CONTROL_TEXTS or any(
        text.startswith(begin) and text.endswith(end) for begin, end in _CONTROL_ENDS
    )
