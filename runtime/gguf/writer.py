"""Write GGUF v3 files: metadata, tensor table, then the data of each tensor as it is produced."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from runtime.ops.dtypes import DType, nbytes_for
from runtime.ops.errors import FileError
from runtime.outputs import appearing

from .header import Stored
from .strings import StringArray

ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
# numpy kind and size -> GGUF value type
_TYPE_IDS = {
    "u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "b1": 7, "u8": 10, "i8": 11,
    "f8": 12,
}  # fmt: skip

Chunk = bytes | memoryview | np.ndarray


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to be written: `chunks()` yields its stored bytes in order."""

    name: str
    shape: tuple[int, ...]  # outermost first
    dtype: DType
    chunks: Callable[[], Iterable[Chunk]]

    @property
    def nbytes(self) -> int:
        """Bytes the data takes in the file, padding apart."""
        return nbytes_for(self.dtype, self.shape)

    @staticmethod
    def of(name: str, shape: Sequence[int], dtype: DType, data: np.ndarray) -> NewTensor:
        """A tensor whose stored bytes are those of the array `data`."""
        return NewTensor(name, tuple(shape), dtype, lambda: [np.ascontiguousarray(data)])


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Sequence[NewTensor],
    progress: Callable[[int], object] = lambda nbytes: None,
) -> None:
    """Write a model file; `progress(n)` is called after every n bytes of tensor data.

    Metadata values may be str, bytes, bool, int and float (stored in 32 bits where they fit),
    numpy scalars and arrays (their own types), sequences of these, and what a file has `Stored`.
    The file appears at `path` only when it is whole. FileError when it cannot be written.
    """
    with appearing(path) as file:
        file.write(_header(metadata, tensors))
        for tensor in tensors:
            _write_data(file, tensor, progress)


def file_nbytes(metadata: Mapping[str, Any], tensors: Sequence[NewTensor]) -> int:
    """Of the file that `write_gguf` makes of these."""
    return len(_header(metadata, tensors)) + sum(t.nbytes + -t.nbytes % ALIGNMENT for t in tensors)


def _header(metadata: Mapping[str, Any], tensors: Sequence[NewTensor]) -> bytes:
    pieces = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        pieces.append(_string(key))
        if isinstance(value, Stored):
            pieces.append(bytes(value.raw))
        else:
            kind, body = _encode(value)
            pieces += [struct.pack("<I", kind), body]
    offset = 0
    for tensor in tensors:
        dims = tensor.shape[::-1]
        if tensor.dtype.gguf_id is None:
            raise FileError(f"tensor {tensor.name}: {tensor.dtype} cannot be stored; choose a type")
        pieces += [_string(tensor.name), struct.pack(f"<I{len(dims)}Q", len(dims), *dims)]
        pieces.append(struct.pack("<IQ", tensor.dtype.gguf_id, offset))
        offset += tensor.nbytes + -tensor.nbytes % ALIGNMENT
    header = b"".join(pieces)
    return header + bytes(-len(header) % ALIGNMENT)


def _write_data(file: BinaryIO, tensor: NewTensor, progress: Callable[[int], object]) -> None:
    written = 0
    for chunk in tensor.chunks():
        view = memoryview(chunk).cast("B") if not isinstance(chunk, np.ndarray) else chunk.data
        file.write(view)
        written += view.nbytes
        progress(view.nbytes)
    if written != tensor.nbytes:
        raise FileError(
            f"tensor {tensor.name} {tensor.dtype} {list(tensor.shape)} takes {tensor.nbytes} "
            f"bytes, {written} given"
        )
    file.write(bytes(-written % ALIGNMENT))


def _string(text: str | bytes) -> bytes:
    raw = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def _encode(value: Any) -> tuple[int, bytes]:
    """(value type, bytes) of one metadata value."""
    if isinstance(value, str | bytes):
        return _STRING, _string(value)
    if isinstance(value, StringArray):
        return _encode_array([value.raw(i) for i in range(len(value))])
    if isinstance(value, Sequence) or (isinstance(value, np.ndarray) and value.ndim):
        return _encode_array(value)
    number = np.asarray(value) if isinstance(value, np.generic) else _number(value)
    return _TYPE_IDS[number.dtype.str[1:]], number.tobytes()


def _encode_array(values: Sequence[Any] | np.ndarray) -> tuple[int, bytes]:
    if not isinstance(values, np.ndarray) and len(values) and isinstance(values[0], str | bytes):
        kind, body = _STRING, b"".join(map(_string, values))
    else:
        numbers = values if isinstance(values, np.ndarray) else _numbers(values)
        numbers = numbers.astype(numbers.dtype.newbyteorder("<"))
        kind, body = _TYPE_IDS[numbers.dtype.str[1:]], numbers.tobytes()
    return _ARRAY, struct.pack("<IQ", kind, len(values)) + body


def _number(value: Any) -> np.ndarray:
    if isinstance(value, bool):
        return np.asarray(value)
    if isinstance(value, float):
        fits = not np.isfinite(value) or abs(value) <= float(np.finfo(np.float32).max)
        return np.asarray(value, "<f4" if fits else "<f8")
    if 0 <= value < 1 << 32:
        return np.asarray(value, "<u4")
    return np.asarray(value, "<i4" if -(1 << 31) <= value < 0 else "<i8")


def _numbers(values: Sequence[Any]) -> np.ndarray:
    """A list as an array: bool, i32 (i64 where needed) or f32."""
    array = np.asarray(values)
    if array.dtype.kind == "f":
        return array.astype("<f4")
    if array.dtype.kind == "b" or (len(array) and max(abs(array.min()), array.max()) >= 1 << 31):
        return array
    return array.astype("<i4")
