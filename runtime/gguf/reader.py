"""Open GGUF files, split or whole.

Opening reads metadata and the tensor table only; weights are read when they are asked for, into
memory of their own. What was read stays as it was, whatever becomes of the file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtime.ops.dtypes import MXFP4, DType
from runtime.ops.errors import FileError
from runtime.ops.quants import dequantize

from .header import Header, Stored, TensorInfo, parse_header, quoted, stored_metadata
from .source import Head, Source

_PART_NAME = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


class GGUFTensor:
    """A named weight of an open file. Attributes: name, shape (outermost first), dtype, nbytes,
    offset (from the start of the file `path`)."""

    __slots__ = ("_paired", "_part", "dtype", "name", "nbytes", "offset", "shape")

    def __init__(self, part: _Part, info: TensorInfo) -> None:
        self._part = part
        self.name: str = info.name
        self.shape: tuple[int, ...] = info.shape
        self.dtype: DType = info.dtype
        self.offset: int = info.offset
        self.nbytes: int = info.nbytes
        self._paired: bool = info.paired

    @property
    def path(self) -> Path:
        """The file (of a split model: the part) that holds the data."""
        return self._part.path

    @property
    def data(self) -> np.ndarray:
        """The stored bytes, uint8 [nbytes], read now. FileError: the file has changed."""
        return self.read(0, np.empty(self.nbytes, np.uint8))

    def read(self, start: int, out: np.ndarray) -> np.ndarray:
        """Fill `out`, uint8 and contiguous, with stored bytes from `start` on; `out`.

        Both are whole blocks; those of Ollama's first MXFP4 files come in the order of ggml.
        FileError: the file cannot be read, or has changed.
        """
        self._part.source.read(self.offset + start, out)
        if self._paired:
            _unpair(out)
        return out

    def array(self) -> np.ndarray:
        """The values of a plain type, in `shape`, read now (bf16: its bits in uint16).

        FileError for a block format, which has no addressable elements.
        """
        if self.dtype.numpy is None:
            raise FileError(
                f"{self.path}: tensor {quoted(self.name)} is {self.dtype}, a block format; "
                "use to_float32() for its values"
            )
        return self.data.view(self.dtype.numpy).reshape(self.shape)

    def to_float32(self) -> np.ndarray:
        """The values as a new float32 array of `shape`, whatever the stored type."""
        return dequantize(self.data, self.dtype, self.shape)

    def __repr__(self) -> str:
        return f"<GGUFTensor {self.name} {self.dtype} {list(self.shape)}>"


class _Part(NamedTuple):
    """One file and what its header says."""

    source: Source
    header: Header

    @property
    def path(self) -> Path:
        return self.source.path


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """An open model file, all parts together.

    `path` and `version` are the first part's. `metadata` maps keys to Python numbers, bools and
    strings, numeric arrays to numpy arrays, string arrays to `StringArray`. `tensors` keeps the
    order of the file.
    """

    path: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]
    nbytes: int

    def get(self, key: str, default: Any = None) -> Any:
        """Metadata value of `key`, or `default`."""
        return self.metadata.get(key, default)

    @property
    def architecture(self) -> str:
        """`general.architecture`; FileError when the file does not say."""
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str):
            raise FileError(
                f"{self.path}: no general.architecture in the metadata, so it cannot be known "
                "what model this is; convert it again with a current converter"
            )
        return name

    @property
    def paths(self) -> set[Path]:
        """All files that it is in."""
        return {self.path, *(tensor.path for tensor in self.tensors.values())}

    @property
    def opened(self) -> list[tuple[str, int, int]]:
        """Of all files with tensors name, bytes and time of change (ns) when they were opened."""
        sources = {
            tensor._part.source.path: tensor._part.source for tensor in self.tensors.values()
        }
        return [(path.name, *source.opened) for path, source in sorted(sources.items())]

    def stored_metadata(self) -> dict[str, Stored]:
        """The metadata as it is stored, for `write_gguf`, which keeps every number's type."""
        return stored_metadata(Head(Source(self.path)))

    @property
    def tensors_nbytes(self) -> int:
        """Bytes of all tensors together, which is less than the file by its header."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open the model at `path`; of a split model (`-00001-of-00003.gguf`) any part opens all.

    FileError, in one line, for anything that is missing, damaged or not supported.
    """
    if not os.fspath(path):
        raise FileError("the path of the model is empty: give that of a .gguf file")
    part = _open_part(Path(path))
    count = _integer(part, "split.count")
    return _joined([part] if count in (None, 0, 1) else _open_parts(part, count))


def _open_part(path: Path) -> _Part:
    source = Source(path)
    return _Part(source, parse_header(Head(source)))


def _integer(part: _Part, key: str) -> int | None:
    """A whole number from the metadata, None where the key is missing."""
    value = part.header.metadata.get(key)
    if value is not None and type(value) is not int:
        raise FileError(f"{part.path}: {key} must be a whole number; download the file again")
    return value


def _open_parts(opened: _Part, count: int) -> list[_Part]:
    name = _PART_NAME.fullmatch(opened.path.name)
    if name is None or int(name["count"]) != count or not 1 <= int(name["part"]) <= count:
        raise FileError(
            f"{opened.path}: this is one of {count} parts of a split model, but its name does "
            f"not end in -NNNNN-of-{count:05d}.gguf; give it its original name"
        )
    paths = [
        opened.path.with_name(f"{name['stem']}-{number:05d}-of-{count:05d}.gguf")
        for number in range(1, count + 1)
    ]
    for number, path in enumerate(paths, 1):
        if not path.exists():
            raise FileError(
                f"{path}: part {number} of {count} is missing; put all parts into one folder"
            )
    parts = [opened if path.name == opened.path.name else _open_part(path) for path in paths]
    for number, part in enumerate(parts):
        _check_part(part, number, count)
    return parts


def _check_part(part: _Part, number: int, count: int) -> None:
    says = _integer(part, "split.no"), _integer(part, "split.count")
    if says != (number, count):
        raise FileError(
            f"{part.path}: its metadata says part {says[0]} of {says[1]} (counted from 0), its "
            f"name says {number} of {count}; give the parts their original names"
        )


def _joined(parts: list[_Part]) -> GGUFFile:
    first = parts[0]
    tensors: dict[str, GGUFTensor] = {}
    for part in parts:
        for info in part.header.tensors.values():
            if info.name in tensors:
                raise FileError(
                    f"{part.path}: tensor {quoted(info.name)} is in {tensors[info.name].path} "
                    "too; download the parts again"
                )
            tensors[info.name] = GGUFTensor(part, info)
    expected = _integer(first, "split.tensors.count")
    if len(parts) > 1 and expected not in (None, len(tensors)):
        raise FileError(
            f"{first.path}: the parts hold {len(tensors)} tensors, {expected} are announced; "
            "download the parts again"
        )
    nbytes = sum(part.source.size for part in parts)
    return GGUFFile(first.path, first.header.version, first.header.metadata, tensors, nbytes)


def _unpair(stored: np.ndarray) -> None:
    """MXFP4 blocks where a byte holds neighbours, 2i and 2i + 1: now i and i + 16 in each."""
    blocks = stored.reshape(-1, MXFP4.nbytes)
    codes = blocks[:, 1:]
    in_turn = np.stack([codes & 15, codes >> 4], axis=-1).reshape(-1, MXFP4.block)
    blocks[:, 1:] = in_turn[:, :16] | in_turn[:, 16:] << 4
