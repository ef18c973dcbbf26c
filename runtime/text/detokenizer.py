"""Tokens to text, piece by piece: a character may be spread over several tokens."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from collections.abc import Set as AbstractSet


class TextStream:
    """Text of one sequence of tokens as it grows.

    `feed(id)` returns what can be shown so far and holds back an unfinished UTF-8 character;
    `flush()` ends the text, an unfinished character becoming U+FFFD. Pieces joined are the
    text of all tokens. Tokens in `hidden` show nothing; `hidden_text(id)` is how they are written.
    """

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        strip_space: bool = False,
        hidden: AbstractSet[int] = frozenset(),
    ):
        """`token_bytes` gives a token's bytes; `strip_space` drops one leading space."""
        self._token_bytes = token_bytes
        self._strip_space = strip_space
        self._hidden = hidden
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that `token` completes; may be empty. Raises TextError for a wrong id."""
        written = self._token_bytes(token)
        if token in self._hidden:
            return ""
        return self._show(self._decoder.decode(written))

    def hidden_text(self, token: int) -> str:
        """The text of a token that `feed` does not show ("<|im_start|>"), else ""."""
        if token not in self._hidden:
            return ""
        return self._token_bytes(token).decode("utf-8", "replace")

    def flush(self) -> str:
        """What was held back, and a fresh start."""
        text = self._show(self._decoder.decode(b"", final=True))
        self._decoder.reset()
        return text

    def _show(self, text: str) -> str:
        if self._strip_space and text:
            self._strip_space = False
            return text.removeprefix(" ")
        return text
