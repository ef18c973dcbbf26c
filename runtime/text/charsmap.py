"""The character map of a SentencePiece model: how it writes text before it looks for tokens.

`tokenizer.ggml.precompiled_charsmap` is a length, a trie of byte strings of that many bytes, and
the texts that stand for them, each ended by a zero byte. Wherever the text goes on with a string
of the trie, the longest such is replaced; everything else stays as it is. (The `tokenizers`
library applies the map to graphemes instead, which loses combining marks.)

The trie is a double array (Aoe 1989) of 32-bit units as darts-clone packs them: the label in the
low byte, bit 8 says that a string ends here, the rest is the distance to the children, which is
added by exclusive or.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

import numpy as np

from runtime.ops.errors import TextError

_KEY = "tokenizer.ggml.precompiled_charsmap"
_LABEL, _ENDS, _VALUE = 0x800000FF, 0x100, 0x7FFFFFFF


class CharsMap:
    """Text to text, by the map in `packed`. Raises TextError when that is damaged."""

    def __init__(self, packed: bytes):
        size = struct.unpack_from("<I", packed)[0] if len(packed) >= 4 else 0
        if size < 4 or size % 4 or len(packed) < 4 + size:
            raise TextError(f"{_KEY} is damaged: convert the model again")
        self._units: list[int] = np.frombuffer(packed, "<u4", size // 4, 4).tolist()
        self._texts = packed[4 + size :]

    @classmethod
    def from_numbers(cls, values: Iterable[int]) -> CharsMap:
        """The map from an array of signed or unsigned bytes, as GGUF files have it."""
        try:
            packed = bytes(int(v) & 255 for v in values)
        except (TypeError, ValueError):
            raise TextError(f"{_KEY} is not an array of bytes: convert the model again") from None
        return cls(packed)

    def __call__(self, text: str) -> str:
        data = text.encode("utf-8", "replace")
        pieces: list[bytes] = []
        at = done = 0
        while at < len(data):
            length, value = self._longest(data, at)
            if length:
                pieces += (data[done:at], self._text(value))
                at += length
                done = at
            else:
                at += 1
        pieces.append(data[done:])
        return b"".join(pieces).decode("utf-8", "replace")

    def _longest(self, data: bytes, at: int) -> tuple[int, int]:
        """(length, place of its text) of the longest string of the trie at data[at:]; 0: none."""
        units, length, value = self._units, 0, 0
        node = _children(0, units[0])
        try:
            for i in range(at, len(data)):
                node ^= data[i]
                unit = units[node]
                if unit & _LABEL != data[i]:
                    break
                node = _children(node, unit)
                if unit & _ENDS:
                    length, value = i + 1 - at, units[node] & _VALUE
        except IndexError:
            raise TextError(f"{_KEY} is damaged: convert the model again") from None
        return length, value

    def _text(self, place: int) -> bytes:
        end = self._texts.find(b"\0", place)
        if end < 0:
            raise TextError(f"{_KEY} is damaged: convert the model again")
        return self._texts[place:end]


def _children(node: int, unit: int) -> int:
    return node ^ ((unit >> 10) << ((unit & 0x200) >> 6))
