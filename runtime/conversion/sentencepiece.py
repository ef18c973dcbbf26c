"""SentencePiece vocabularies: tokenizer.model, or a tokenizer.json that was made of one."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from runtime.conversion.added import Added
from runtime.conversion.checkpoint import Checkpoint, refuse_stand_in
from runtime.gguf.other_formats import stand_in
from runtime.ops.errors import TextError
from runtime.text.special_ids import BYTE, CONTROL, NORMAL, UNUSED, USER_DEFINED
from runtime.text.vocabulary import byte_of

_NOTHING, _ADDED = -10000.0, -1000.0  # scores of ids without a token, and of added tokens


class Piece(NamedTuple):
    """A token. kind: as in `tokenizer.ggml.token_type`, which are SentencePiece's own."""

    text: str
    score: float
    kind: int


def read(checkpoint: Checkpoint, spec: Mapping[str, Any] | None, rows: int) -> list[Piece] | None:
    """The tokens by id; None where the checkpoint's vocabulary is of another kind.

    spec: what tokenizer.json holds. TextError: tokenizer.model is damaged.
    """
    path = checkpoint.folder / "tokenizer.model"
    if path.is_file():
        try:
            raw = path.read_bytes()
            found = [] if stand_in(raw) else [*_pieces(raw)]
        except (OSError, ValueError, IndexError, struct.error) as error:
            raise TextError(f"{path}: no SentencePiece model ({error})") from None
        refuse_stand_in(path, raw)
        if not found:
            raise TextError(f"{path}: no SentencePiece model (it has no pieces)")
        return found[:rows]
    model = (spec or {}).get("model") or {}
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        return None
    return _ranked(model, rows)


def keys(pieces: list[Piece], added: Added, rows: int) -> dict[str, Any]:
    """Keys of the vocabulary, ids without a token included."""
    texts = [f"[PAD{i}]" for i in range(rows)]
    scores, kinds = np.full(rows, _NOTHING, np.float32), np.full(rows, UNUSED, np.int32)
    for i, piece in enumerate(pieces):
        texts[i], scores[i], kinds[i] = piece
    for i, text, control in added:
        if i < rows:
            texts[i], scores[i], kinds[i] = text, _ADDED, CONTROL if control else USER_DEFINED
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": texts, "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
    }  # fmt: skip


def _ranked(model: Mapping[str, Any], rows: int) -> list[Piece]:
    """From byte pairs: a token made by an earlier merge has a higher score."""
    rank: dict[str, int] = {}
    for at, pair in enumerate(model.get("merges") or []):
        halves = pair.split(" ") if isinstance(pair, str) else pair
        rank.setdefault("".join(halves), at)
    found = [Piece(f"[PAD{i}]", _NOTHING, UNUSED) for i in range(rows)]
    for text, i in model["vocab"].items():
        if i < rows:
            score = float(-rank[text]) if text in rank else _NOTHING
            found[i] = Piece(text, score, BYTE if byte_of(text) else NORMAL)
    return found


def _pieces(raw: bytes) -> Iterator[Piece]:
    """The pieces of a ModelProto (sentencepiece_model.proto: field 1, repeated)."""
    for number, value in _fields(raw):
        if number == 1 and isinstance(value, bytes):
            fields = dict(_fields(value))
            score = struct.unpack("<f", fields.get(2, bytes(4)))[0]
            yield Piece(fields[1].decode("utf-8"), score, fields.get(3, NORMAL))


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protocol buffer; lengths and numbers are checked."""
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(raw, at)
            yield tag >> 3, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            size, at = _varint(raw, at)
        if size is None or at + size > len(raw):
            raise ValueError("a field that is cut off or unknown")
        yield tag >> 3, raw[at : at + size]
        at += size


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits for each byte, and where the next field begins."""
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number that does not end")
