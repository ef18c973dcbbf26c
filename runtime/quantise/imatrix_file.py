"""Importance matrix files: of each weight's input, the sum of the squares seen in each column.

Both formats of llama.cpp are read and written, GGUF and the older .dat.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime.gguf.reader import GGUFFile, open_gguf
from runtime.gguf.writer import NewTensor, write_gguf
from runtime.ops.dtypes import F32
from runtime.ops.errors import FileError
from runtime.outputs import appearing

_SQUARES, _COUNTS, _SUMS, _STATS = ".in_sum2", ".counts", ".in_sum", ".stats"
_AGAIN = "make it again with `runtime imatrix` or llama-imatrix"


@dataclass(frozen=True)
class Entry:
    """Of one weight: float32 [matrices, columns] sums of squared inputs, and [matrices] the rows
    that were summed. A .dat file does not tell matrices apart: there all are one.

    sums: [matrices, columns] of the inputs themselves; stats: [n] as `imatrix.stats_schema` says.
    """

    squares: np.ndarray
    counts: np.ndarray
    sums: np.ndarray | None = None
    stats: np.ndarray | None = None

    @property
    def mean_squares(self) -> np.ndarray:
        """float32 [matrices, columns]: means; ones of a matrix (an expert) that saw nothing."""
        counts = np.rint(self.counts)[:, None].astype(np.float32)
        return np.where(counts > 0, self.squares / np.maximum(counts, 1), np.float32(1))


@dataclass(frozen=True)
class Imatrix:
    """Entries by the weight's name, and of which texts, in how many windows of how many tokens.

    schema: what the numbers of each entry's `stats` are.
    """

    entries: Mapping[str, Entry]
    datasets: Sequence[str] = ()
    chunks: int = 0
    chunk_tokens: int = 0
    schema: Sequence[str] = ()


def read(path: str | os.PathLike[str]) -> Imatrix:
    """The importance matrix in a file; FileError: it is none, damaged, not finite, negative."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        found = _from_gguf(open_gguf(path)) if is_gguf else _from_dat(path, path.read_bytes())
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror or error})") from error
    for name, entry in found.entries.items():
        for values in (entry.squares, entry.counts):
            if not np.isfinite(values).all():
                raise FileError(f"{path}: the entry of {name} is not finite; {_AGAIN}")
            if (values < 0).any():
                raise FileError(f"{path}: the entry of {name} has negative numbers; {_AGAIN}")
    return found


def write(path: str | os.PathLike[str], imatrix: Imatrix) -> None:
    """Write GGUF, weights sorted by name. FileError when that fails; then there is no file."""
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": [*imatrix.datasets],
        "imatrix.chunk_count": imatrix.chunks,
        "imatrix.chunk_size": imatrix.chunk_tokens,
        **({"imatrix.stats_schema": [*imatrix.schema]} if imatrix.schema else {}),
    }
    tensors = []
    for name, entry in sorted(imatrix.entries.items()):
        several = len(entry.counts) > 1
        parts = {
            _SQUARES: entry.squares, _COUNTS: entry.counts[:, None], _SUMS: entry.sums,
            _STATS: entry.stats,
        }  # fmt: skip
        for ending, values in parts.items():
            if values is not None:
                shape = values.shape if several or values.ndim == 1 else values.shape[1:]
                data = values.astype("<f4")
                tensors.append(NewTensor.of(name + ending, shape, F32, data))
    write_gguf(path, metadata, tensors)


def write_dat(path: str | os.PathLike[str], imatrix: Imatrix) -> None:
    """Write the older format, which has the means of squares alone; entries without rows are left
    out.

    FileError when the file cannot be written; it appears only when it is whole.
    """
    found = {n: e for n, e in sorted(imatrix.entries.items()) if e.counts.any()}
    pieces = [struct.pack("<i", len(found))]
    for name, entry in found.items():
        calls = math.ceil(entry.counts.max() / max(1, imatrix.chunk_tokens))
        values = (entry.mean_squares * np.float32(calls)).astype("<f4")
        pieces += [_counted(name), struct.pack("<ii", calls, values.size), values.tobytes()]
    text = imatrix.datasets[-1] if imatrix.datasets else ""
    pieces += [struct.pack("<i", imatrix.chunks), _counted(text)]
    with appearing(path) as file:
        file.write(b"".join(pieces))


def _counted(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<i", len(raw)) + raw


def _from_gguf(file: GGUFFile) -> Imatrix:
    entries = {}
    for full in file.tensors:
        name = full.removesuffix(_SQUARES)
        if name == full:
            continue
        counts = _values(file, name + _COUNTS).reshape(-1)
        squares = _values(file, full)
        if not counts.size or squares.size % counts.size:
            raise FileError(f"{file.path}: sums and counts of {name} do not match; {_AGAIN}")
        sums, stats = (
            _values(file, name + ending) if name + ending in file.tensors else None
            for ending in (_SUMS, _STATS)
        )
        shape = counts.size, -1
        sums = sums.reshape(shape) if sums is not None and sums.size == squares.size else None
        entries[name] = Entry(squares.reshape(shape), counts, sums, stats)
    if not entries:
        kind = "has no entries" if file.get("general.type") == "imatrix" else "is a model's file"
        raise FileError(f"{file.path}: not an importance matrix: this {kind}; {_AGAIN}")
    chunks, tokens = (file.get(f"imatrix.{key}", 0) for key in ("chunk_count", "chunk_size"))
    texts, schema = (tuple(file.get(f"imatrix.{key}", ())) for key in ("datasets", "stats_schema"))
    return Imatrix(entries, texts, int(chunks), int(tokens), schema)


def _values(file: GGUFFile, name: str) -> np.ndarray:
    tensor = file.tensors.get(name)
    if tensor is None or tensor.dtype is not F32:
        raise FileError(f"{file.path}: {name} is missing or not float32; {_AGAIN}")
    return tensor.array()


def _from_dat(path: Path, raw: bytes) -> Imatrix:
    """The older format: counted entries of name, calls, values; calls and text at the end."""
    entries, at = {}, 4
    try:
        (count,) = struct.unpack_from("<i", raw)
        for _ in range(count):
            name, at = _string(raw, at)
            calls, size = struct.unpack_from("<ii", raw, at)
            at += 8
            if size < 1 or not name:
                raise ValueError("an empty entry")
            values = np.frombuffer(raw, "<f4", size, at)[None]
            entries[name] = Entry(values, np.array([max(calls, 1)], np.float32))
            at += 4 * size
        chunks = struct.unpack_from("<i", raw, at)[0] if at + 4 <= len(raw) else 0
        texts = (_string(raw, at + 4)[0],) if at + 8 <= len(raw) else ()
    except (struct.error, ValueError) as error:
        raise FileError(f"{path}: not an importance matrix, or damaged; {_AGAIN}") from error
    if not entries:
        raise FileError(f"{path}: an importance matrix without entries; {_AGAIN}")
    return Imatrix(entries, tuple(filter(None, texts)), chunks)


def _string(raw: bytes, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<i", raw, at)
    end = at + 4 + length
    if length < 0 or end > len(raw):
        raise ValueError("a string past the end")
    return raw[at + 4 : end].decode("utf-8", "replace"), end
