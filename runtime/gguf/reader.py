"""Open GGUF files: memory-mapped, split or whole, with tensors as views of the map.

Opening reads metadata and the tensor table only; weights come in as they are touched.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.ops.dtypes import MXFP4, DType
from runtime.ops.errors import FileError
from runtime.ops.quants import dequantize

from .header import Header, TensorInfo, parse_header, quoted

_PART_NAME = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


class GGUFTensor:
    """A named weight in a mapped file. Attributes: name, shape (outermost first), dtype, nbytes,
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
        """The stored bytes, uint8 [nbytes], a read-only view of the map.

        Of Ollama's first MXFP4 files a copy in the order of ggml.
        """
        stored = self._part.content[self.offset : self.offset + self.nbytes]
        return _unpaired(stored) if self._paired else stored

    def array(self) -> np.ndarray:
        """The values of a plain type, in `shape`, a read-only view (bf16: its bits in uint16).

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


@dataclass(frozen=True, slots=True)
class _Part:
    """One mapped file and what its header says."""

    path: Path
    map: mmap.mmap
    content: np.ndarray  # the whole file, uint8
    header: Header


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """An open model file, all parts together.

    `path` and `version` are the first part's. `metadata` maps keys to Python numbers, bools and
    strings, numeric arrays to numpy arrays, string arrays to `StringArray`. `tensors` keeps the
    order of the file. The map lives as long as this object or any view of it.
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
    def tensors_nbytes(self) -> int:
        """Bytes of all tensors together, which is less than the file by its header."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def drop_pages(self, tensor: GGUFTensor) -> None:
        """Tell the system that `tensor`'s pages may leave memory; they are read again on need.

        Does nothing where the system has no such call.
        """
        _advise(tensor, "MADV_DONTNEED", inward=True)

    def prefetch(self, tensor: GGUFTensor) -> None:
        """Tell the system that `tensor` is read soon, so that it starts to read ahead."""
        _advise(tensor, "MADV_WILLNEED", inward=False)


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open the model at `path`; of a split model (`-00001-of-00003.gguf`) any part opens all.

    FileError, in one line, for anything that is missing, damaged or not supported.
    """
    part = _open_part(Path(path))
    count = _integer(part, "split.count")
    return _joined([part] if count in (None, 0, 1) else _open_parts(part, count))


def _open_part(path: Path) -> _Part:
    try:
        if path.is_dir():
            raise FileError(f"{path}: this is a folder; {_files_in(path)}")
        if not path.is_file():
            what = "is not a file" if path.exists() else "no such file"
            raise FileError(f"{path}: {what}; check the path")
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise FileError(f"{path}: the file is empty; download it again")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        if isinstance(error, FileError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise FileError(f"{path}: cannot be read ({reason}); check its permissions") from error
    content = np.frombuffer(mapped, np.uint8)
    return _Part(path, mapped, content, parse_header(memoryview(mapped), path))


def _files_in(folder: Path) -> str:
    """What to do about a folder that was given for a file."""
    names = sorted(path.name for path in folder.glob("*.gguf"))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    if not names:
        return "give the path of a .gguf file"
    return f"give a file in it: {', '.join(names[:3])}{more}"


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
    nbytes = sum(len(part.content) for part in parts)
    return GGUFFile(first.path, first.header.version, first.header.metadata, tensors, nbytes)


def _unpaired(stored: np.ndarray) -> np.ndarray:
    """MXFP4 blocks where a byte holds neighbours, 2i and 2i + 1, with i and i + 16 in each."""
    blocks = stored.reshape(-1, MXFP4.nbytes).copy()
    codes = blocks[:, 1:]
    in_turn = np.stack([codes & 15, codes >> 4], axis=-1).reshape(-1, MXFP4.block)
    blocks[:, 1:] = in_turn[:, :16] | in_turn[:, 16:] << 4
    return blocks.reshape(-1)


def _advise(tensor: GGUFTensor, advice: str, inward: bool) -> None:
    """madvise the whole pages within (or around) a tensor's bytes."""
    option = getattr(mmap, advice, None)
    begin, end = tensor.offset, tensor.offset + tensor.nbytes
    if inward:
        begin, end = begin + -begin % mmap.PAGESIZE, end - end % mmap.PAGESIZE
    else:
        begin -= begin % mmap.PAGESIZE
    if option is not None and end > begin:
        tensor._part.map.madvise(option, begin, end - begin)
