"""A Hugging Face checkpoint folder: its JSON files, and its tensors in safetensors files.

A safetensors file is the length of a header in eight bytes, the header in JSON, and data. It is
read here rather than by the library of that name, whose numpy side has no bfloat16.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtime.gguf.other_formats import stand_in
from runtime.gguf.source import Source
from runtime.ops.errors import FileError, shown

# what a header calls a type -> how its numbers are read; the 16-bit brain float as its bits
KINDS = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1", "F8_E4M3": "u1",
    "F8_E5M2": "u1", "F8_E8M0": "u1", "I8": "i1", "BOOL": "u1", "I16": "<i2", "U16": "<u2",
    "I32": "<i4", "U32": "<u4", "I64": "<i8", "U64": "<u8",
}  # fmt: skip
_MOST_HEADER = 256 << 20
_HEAD = 256  # bytes that tell what a file is
_INDEX = "model.safetensors.index.json"
_OTHERS = ("pytorch_model*.bin", "consolidated*", "*.pth", "*.gguf", "*.npz")


class Stored(NamedTuple):
    """A tensor of a checkpoint as a matrix: rows are all axes but the last, or single numbers.

    kind: its type as safetensors calls it. offset: of its data in the file, in bytes.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    source: Source
    offset: int

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.width * np.dtype(KINDS[self.kind]).itemsize

    @property
    def label(self) -> str:
        """Tensor and file, for messages."""
        return f"{self.source.path}: tensor {shown(self.name, 120)}"

    def take(self, index: np.ndarray) -> np.ndarray:
        """The rows of these numbers [n, width], as they are stored.

        What lies between them is read too where that is little.
        """
        low, high = (int(index.min()), int(index.max()) + 1) if len(index) else (0, 0)
        if high - low <= 2 * len(index):
            found = self._between(low, high)
            in_turn = high - low == len(index) and bool((np.diff(index) == 1).all())
            return found if in_turn else found[index - low]
        starts = [0, *(np.flatnonzero(np.diff(index) != 1) + 1), len(index)]
        runs = pairwise(starts)
        return np.concatenate(
            [self._between(int(index[a]), int(index[b - 1]) + 1) for a, b in runs]
        )

    def _between(self, start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start) * self.row_bytes, np.uint8)
        self.source.read(self.offset + start * self.row_bytes, out)
        return out.view(KINDS[self.kind]).reshape(stop - start, self.width)


class Checkpoint:
    """The folder of a model. `tensors`: by name, shard after shard, sorted within each."""

    def __init__(self, folder: Path) -> None:
        """FileError, in one line that names the file, for what is missing or damaged."""
        self.folder = folder
        if not folder.is_dir():
            what = "this is a file" if folder.exists() else "no such folder"
            raise FileError(
                f"{folder}: {what}; give the folder of a Hugging Face checkpoint, the one that "
                "has config.json in it"
            )
        config = self.json("config.json")
        if config is None:
            raise FileError(f"{folder}: no config.json; give the folder of a checkpoint")
        self.config = config
        self.tensors: dict[str, Stored] = {}
        index = self._index()
        for file in sorted(set(index.values())) if index else self._files():
            self._open(file)
        self._check(index)

    def json(self, name: str) -> dict[str, Any] | None:
        """The object in a file of the folder; None where there is none. FileError: it is broken."""
        text = self.text(name)
        if text is None:
            return None
        try:
            found = json.loads(text)
            if "\\ud" in text.lower():  # halves of characters, which no library takes
                json.dumps(found, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise FileError(f"{self.folder / name}: no valid JSON ({error})") from None
        return self._object(found, name)

    def text(self, name: str) -> str | None:
        """What a file of the folder says; None where there is none."""
        path = self.folder / name
        try:
            found = path.read_text("utf-8") if path.is_file() else None
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"{path}: cannot be read ({error})") from None
        refuse_stand_in(path, (found or "")[:_HEAD].encode())
        return found

    def _object(self, found: Any, name: str) -> dict[str, Any]:
        if not isinstance(found, dict):
            raise FileError(f"{self.folder / name}: no JSON object")
        return found

    def _index(self) -> Mapping[str, str]:
        """tensor -> file, as the checkpoint's index says; empty where it has none."""
        index = self.json(_INDEX)
        if index is None:
            return {}
        found = self._object(index.get("weight_map"), f"{_INDEX} (weight_map)")
        for tensor, file in found.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise FileError(
                    f"{self.folder / _INDEX}: the file of tensor {shown(tensor)} is {shown(file)}, "
                    "not the name of a file beside it"
                )
        return found

    def _files(self) -> list[str]:
        found = sorted(path.name for path in self.folder.glob("model*.safetensors"))
        if not found:
            others = [path.name for what in _OTHERS for path in sorted(self.folder.glob(what))]
            have = f" (it has {others[0]}, which is not read here)" if others else ""
            raise FileError(f"{self.folder}: no model.safetensors and no {_INDEX}{have}")
        return found

    def _open(self, file: str) -> None:
        if not (self.folder / file).is_file():
            raise FileError(
                f"{self.folder / file}: this part is missing; download it into the same folder"
            )
        for stored in _tensors_of(Source(self.folder / file)):
            if stored.name in self.tensors:
                first = self.tensors[stored.name].source.path.name
                raise FileError(f"{stored.label} is in {first} too")
            self.tensors[stored.name] = stored

    def _check(self, index: Mapping[str, str]) -> None:
        """FileError: the index names tensors that no file has."""
        missing = [name for name in index if name not in self.tensors]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise FileError(
                f"{self.folder / index[missing[0]]}: tensor {shown(missing[0])}{more} of {_INDEX} "
                "is not in it; download it again"
            )


def refuse_stand_in(path: Path, head: bytes) -> None:
    """FileError where a file begins as what downloads leave in place of it."""
    if found := stand_in(head):
        raise FileError(f"{path}: this is {found[0]}, not the file: {found[1]}")


def _tensors_of(source: Source) -> list[Stored]:
    """The tensors of one file, by name. FileError: the header cannot be used."""
    head = bytes(source.read(0, np.empty(min(_HEAD, source.size), np.uint8)))
    refuse_stand_in(source.path, head)
    length = int.from_bytes(head[:8], "little")
    if not 2 <= length <= min(_MOST_HEADER, source.size - 8):
        raise FileError(f"{source.path}: not a safetensors file, or cut off; download it again")
    try:
        header = json.loads(bytes(source.read(8, np.empty(length, np.uint8))))
        entries = [(n, e) for n, e in sorted(header.items()) if n != "__metadata__"]
    except (ValueError, AttributeError, RecursionError) as error:
        raise FileError(f"{source.path}: the header is no JSON object ({error})") from None
    return [_stored(source, 8 + length, name, entry) for name, entry in entries]


def _stored(source: Source, data: int, name: str, entry: Any) -> Stored:
    bad = f"{source.path}: tensor {shown(name, 120)}"
    try:
        kind, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sizes = [int(n) for n in (*shape, start, stop)]
        whole = all(type(n) is int and n >= 0 for n in (*shape, start, stop))
    except (TypeError, KeyError, ValueError):
        raise FileError(f"{bad} has no usable dtype, shape and data_offsets") from None
    if kind not in KINDS:
        raise FileError(f"{bad} is of type {shown(kind)}, which is not known")
    nbytes = math.prod(sizes[:-2]) * np.dtype(KINDS[kind]).itemsize
    if not whole or stop - start != nbytes:
        raise FileError(f"{bad} takes {nbytes} bytes, but has {stop - start}")
    if data + stop > source.size:
        raise FileError(f"{bad} ends behind the end of the file; download it again")
    return Stored(name, kind, tuple(shape), source, data + start)
