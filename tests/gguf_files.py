"""Small GGUF files for tests, encoded here byte by byte and not by the code under test."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# value type -> struct letter
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
U32, F32 = 4, 6


class Typed:
    """A metadata value with its GGUF type spelt out; `element` is the type inside an array."""

    def __init__(self, kind: int, value: Any, element: int | None = None) -> None:
        self.kind, self.value, self.element = kind, value, element


def string(text: str | bytes) -> bytes:
    """A length-prefixed string."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def payload(kind: int, value: Any, element: int | None = None) -> bytes:
    """The bytes of a value of this type, its type number left out."""
    if kind == STRING:
        return string(value)
    if kind == ARRAY:
        items = b"".join(payload(element, item) for item in value)
        return struct.pack("<IQ", element, len(value)) + items
    return struct.pack("<" + SCALARS[kind], value)


def typed(value: Any) -> Typed:
    """The usual type of a Python value: u32, f32, bool, string, or an array of one of them."""
    if isinstance(value, Typed):
        return value
    if isinstance(value, str | bytes):
        return Typed(STRING, value)
    if isinstance(value, list | tuple):
        return Typed(ARRAY, value, typed(value[0]).kind if value else U32)
    return Typed(7 if isinstance(value, bool) else F32 if isinstance(value, float) else U32, value)


def header(
    metadata: Mapping[str, Any],
    tensors: Sequence[tuple[str, Sequence[int], int, int]] = (),
    *,
    version: int = 3,
    magic: bytes = b"GGUF",
    n_tensors: int | None = None,
    n_keys: int | None = None,
) -> bytes:
    """A header, padding left out; tensors are (name, shape outermost first, type id, offset)."""
    parts = [magic, struct.pack("<I", version)]
    parts.append(struct.pack("<Q", len(tensors) if n_tensors is None else n_tensors))
    parts.append(struct.pack("<Q", len(metadata) if n_keys is None else n_keys))
    for key, raw_value in metadata.items():
        value = typed(raw_value)
        parts += [string(key), struct.pack("<I", value.kind)]
        parts.append(payload(value.kind, value.value, value.element))
    for name, shape, kind, offset in tensors:
        parts += [string(name), struct.pack("<I", len(shape))]
        parts.append(struct.pack(f"<{len(shape)}Q", *reversed(shape)))
        parts.append(struct.pack("<IQ", kind, offset))
    return b"".join(parts)


def padded(data: bytes, alignment: int = 32) -> bytes:
    """`data` with zeros up to a multiple of the alignment."""
    return data + bytes(-len(data) % alignment)


def gguf_bytes(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[Sequence[int], int, bytes | np.ndarray]] | None = None,
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """A whole file; tensors map names to (shape outermost first, type id, stored bytes)."""
    rows, body = [], b""
    for name, (shape, kind, data) in (tensors or {}).items():
        rows.append((name, shape, kind, len(body)))
        raw = data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes()
        body += padded(raw, alignment)
    return padded(header(metadata, rows, version=version), alignment) + body


def small_file(path: Path, **options: Any) -> Path:
    """A valid file with every kind of metadata and three tensors, at `path`."""
    path.write_bytes(gguf_bytes(small_metadata(), small_tensors(), **options))
    return path


def small_metadata() -> dict[str, Any]:
    """One value of every type, and a vocabulary of five tokens."""
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "general.alignment": 32,
        "tokenizer.ggml.tokens": ["<s>", "a", "", "b\nc", "\N{GREEK SMALL LETTER ALPHA}"],
        "tokenizer.ggml.scores": [0.0, -1.0, -2.0, -3.0, -4.5],
        "tokenizer.ggml.token_type": Typed(ARRAY, [3, 1, 1, 1, 6], element=5),
        "flags": [True, False, True],
    }
    for kind, value in ((0, 200), (1, -7), (2, 65_000), (3, -30_000), (4, 4_000_000_000)):
        metadata[f"scalar.{kind}"] = Typed(kind, value)
    for kind, value in ((5, -2_000_000_000), (6, 0.5), (7, True), (10, 1 << 60), (12, 1e300)):
        metadata[f"scalar.{kind}"] = Typed(kind, value)
    metadata["scalar.11"] = Typed(11, -(1 << 60))
    return metadata


def small_tensors() -> dict[str, tuple[Sequence[int], int, np.ndarray]]:
    """An f32 matrix [3, 4], an f16 vector [5] and a q8_0 matrix [2, 64]."""
    blocks = np.arange(2 * 2 * 34, dtype=np.uint8)
    return {
        "matrix": ((3, 4), 0, np.arange(12, dtype="<f4")),
        "vector": ((5,), 1, np.arange(5, dtype="<f2")),
        "blocks": ((2, 64), 8, blocks),
    }
