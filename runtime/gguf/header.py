"""Parse one GGUF file's header: metadata and the table of tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. No number read from the file
is trusted: counts, lengths and offsets are compared with the bytes that are there before use.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from runtime.ops.dtypes import MXFP4, DType, from_gguf, nbytes_for
from runtime.ops.errors import FileError, OpError

from .other_formats import HEAD, describe
from .source import Head
from .strings import StringArray, scan_strings

MAX_DIMS = 4
_MAX_STRINGS = 1 << 24
_MAX_NAME = 65_535
_MAX_TEXT = 1 << 28
_MAX_NESTING = 4
_MAX_ELEMENTS = 1 << 62
_MIN_KEY_BYTES = 13
_MIN_TENSOR_BYTES = 24
_AGAIN = "download or convert it again"
_PAIRED_MXFP4 = 4  # a number that ggml had given up when Ollama took it

# value type -> little-endian struct letter; 8 is a string and 9 an array
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class TensorInfo(NamedTuple):
    """One row of the tensor table; `offset` counts from the start of the file.

    paired: MXFP4 as Ollama's first gpt-oss files have it, see `GGUFTensor.data`.
    """

    name: str
    shape: tuple[int, ...]  # outermost first
    dtype: DType
    offset: int
    nbytes: int
    paired: bool = False


class Header(NamedTuple):
    """What a file says before its data."""

    version: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


class Stored(NamedTuple):
    """A metadata value as a file has it: the number of its type, then its bytes."""

    raw: memoryview


def quoted(name: str) -> str:
    """`name` for an error message: on one line, printable, and not too long."""
    return ascii(name if len(name) <= 80 else name[:77] + "...")


class Cursor:
    """Reads numbers and strings one after another, each checked against the end of the file."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.path = head.source.path
        self.size = head.source.size
        self.position = 0

    @property
    def buffer(self) -> memoryview:
        """The bytes up to `position`, and some more."""
        return self.head.loaded

    def error(self, what: str, advice: str = _AGAIN) -> FileError:
        """A FileError about this file, to be raised by the caller."""
        return FileError(f"{self.path}: {what}; {advice}")

    def skip(self, nbytes: int, what: str) -> int:
        """Step over `nbytes`, which must be there; their position."""
        position = self.position
        if nbytes > self.size - position:
            raise self.error(
                f"truncated in {what}: {nbytes} bytes expected at byte {position}, "
                f"{self.size - position} present"
            )
        self.position = position + nbytes
        self.head.load(self.position)
        return position

    def unpack(self, letter: str, what: str) -> Any:
        """One number of this struct type."""
        letter = "<" + letter
        return struct.unpack_from(letter, self.buffer, self.skip(struct.calcsize(letter), what))[0]

    def count(self, each: int, what: str) -> int:
        """A count of things that take at least `each` bytes, all of which must be there."""
        count = self.unpack("Q", what)
        if count * each > self.size - self.position:
            raise self.error(
                f"{what} is {count}, which needs at least {count * each} bytes; "
                f"{self.size - self.position} are left"
            )
        return count

    def raw_string(self, limit: int, what: str) -> bytes:
        """A length-prefixed string of at most `limit` bytes."""
        length = self.unpack("Q", what)
        if length > limit:
            raise self.error(f"{what} is {length} bytes long, more than the {limit} allowed")
        start = self.skip(length, what)
        return bytes(self.buffer[start : start + length])

    def name(self, what: str) -> str:
        """A key or tensor name, which must be UTF-8."""
        try:
            return self.raw_string(_MAX_NAME, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} before byte {self.position} is not UTF-8") from error


def parse_header(head: Head) -> Header:
    """Header of the GGUF file that begins with `head`; FileError on any fault."""
    cursor = Cursor(head)
    version = _read_version(cursor)
    n_tensors = cursor.count(_MIN_TENSOR_BYTES, "the number of tensors")
    n_keys = cursor.count(_MIN_KEY_BYTES, "the number of metadata keys")
    metadata = {key: value for key, value, _ in _read_metadata(cursor, n_keys)}
    rows = [_read_tensor_row(cursor) for _ in range(n_tensors)]
    return Header(version, metadata, _place_tensors(cursor, rows, _alignment(cursor, metadata)))


def stored_metadata(head: Head) -> dict[str, Stored]:
    """The metadata of the GGUF file that begins with `head`, as it is stored."""
    cursor = Cursor(head)
    _read_version(cursor)
    cursor.unpack("Q", "the number of tensors")
    n_keys = cursor.count(_MIN_KEY_BYTES, "the number of metadata keys")
    return {key: Stored(raw) for key, _, raw in _read_metadata(cursor, n_keys)}


def _read_version(cursor: Cursor) -> int:
    if bytes(cursor.buffer[:4]) != b"GGUF":
        what, advice = describe(bytes(cursor.buffer[:HEAD]), cursor.size)
        raise cursor.error(f"this is {what}", advice)
    if cursor.size < 8:
        raise cursor.error(f"{cursor.size} bytes are too few for a GGUF file")
    cursor.position = 4
    version = cursor.unpack("I", "the version")
    if version in (2, 3):
        return version
    if version and not version & 0xFFFF:
        raise cursor.error(
            "this is a big-endian GGUF file", "convert it with gguf-py's gguf_convert_endian.py"
        )
    raise cursor.error(
        f"GGUF version {version} is not supported (versions 2 and 3 are)",
        "convert the model again with a current converter",
    )


def _read_metadata(cursor: Cursor, n_keys: int) -> Iterator[tuple[str, Any, memoryview]]:
    """(key, value, its bytes behind its type number)."""
    seen: set[str] = set()
    for _ in range(n_keys):
        key = cursor.name("a metadata key")
        if key in seen:
            raise cursor.error(f"metadata key {quoted(key)} occurs twice")
        seen.add(key)
        start, kind = cursor.position, cursor.unpack("I", "a value type")
        value = _read_value(cursor, kind, f"the value of {quoted(key)}", 0)
        yield key, value, cursor.buffer[start : cursor.position]


def _read_value(cursor: Cursor, kind: int, what: str, depth: int) -> Any:
    if kind in _SCALARS:
        return cursor.unpack(_SCALARS[kind], what)
    if kind == _STRING:
        return cursor.raw_string(_MAX_TEXT, what).decode("utf-8", "replace")
    if kind == _ARRAY:
        return _read_array(cursor, what, depth)
    raise cursor.error(f"{what} has the unknown type {kind} (types 0 to 12 exist)")


def _read_array(cursor: Cursor, what: str, depth: int) -> Any:
    kind = cursor.unpack("I", what)
    if kind in _SCALARS:
        return _read_numbers(cursor, _SCALARS[kind], what)
    if kind == _STRING:
        return _read_strings(cursor, what)
    if kind == _ARRAY and depth < _MAX_NESTING:
        n_inner = cursor.count(12, f"the length of {what}")
        return [_read_array(cursor, what, depth + 1) for _ in range(n_inner)]
    if kind == _ARRAY:
        raise cursor.error(f"{what} nests arrays more than {_MAX_NESTING} deep")
    raise cursor.error(f"{what} has elements of the unknown type {kind} (types 0 to 12 exist)")


def _read_numbers(cursor: Cursor, letter: str, what: str) -> np.ndarray:
    dtype = np.dtype("<" + ("B" if letter == "?" else letter))
    count = cursor.count(dtype.itemsize, f"the length of {what}")
    start = cursor.skip(count * dtype.itemsize, what)
    values = np.ndarray((count,), dtype, cursor.buffer, start)
    return values != 0 if letter == "?" else values


def _read_strings(cursor: Cursor, what: str) -> StringArray:
    count = cursor.count(8, f"the length of {what}")
    if count > _MAX_STRINGS:
        raise cursor.error(f"{what} has {count} strings, more than the {_MAX_STRINGS} allowed")
    start = cursor.position
    try:
        prefixes, end = scan_strings(cursor.head, start, count)
    except (struct.error, OverflowError):
        end = cursor.size + 1
    if end > cursor.size:
        raise cursor.error(
            f"{what} is {count} strings from byte {start} that run past the end of the file "
            f"({cursor.size} bytes)"
        )
    cursor.skip(end - start, what)
    return StringArray(cursor.buffer, prefixes, end)


def _alignment(cursor: Cursor, metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", 32)
    if type(value) is not int or value < 1 or value & (value - 1):
        shown = quoted(str(value))
        raise cursor.error(f"general.alignment must be a power of two, found {shown}")
    return value


def _read_tensor_row(cursor: Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape, type number, offset into the data) as the file has them."""
    name = cursor.name("a tensor name")
    what = f"the table row of tensor {quoted(name)}"
    n_dims = cursor.unpack("I", what)
    if n_dims > MAX_DIMS:
        raise cursor.error(f"tensor {quoted(name)} has {n_dims} dimensions, at most {MAX_DIMS}")
    shape = tuple(cursor.unpack("Q", what) for _ in range(n_dims))[::-1]
    if math.prod(max(n, 1) for n in shape) > _MAX_ELEMENTS:
        raise cursor.error(f"tensor {quoted(name)} has the impossible shape {shape}")
    return name, shape, cursor.unpack("I", what), cursor.unpack("Q", what)


def _place_tensors(
    cursor: Cursor, rows: list[tuple[str, tuple[int, ...], int, int]], alignment: int
) -> dict[str, TensorInfo]:
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in rows:
        if name in tensors:
            raise cursor.error(f"tensor {quoted(name)} occurs twice")
        if offset % alignment:
            raise cursor.error(
                f"tensor {quoted(name)} starts at data byte {offset}, "
                f"which is no multiple of the alignment {alignment}"
            )
        try:
            paired = kind == _PAIRED_MXFP4
            dtype = MXFP4 if paired else from_gguf(kind)
            nbytes = nbytes_for(dtype, shape)
        except (FileError, OpError) as error:
            advice = "convert the model to a supported type"
            raise cursor.error(f"tensor {quoted(name)}: {error}", advice) from error
        tensors[name] = TensorInfo(name, shape, dtype, data_start + offset, nbytes, paired)
    _check_extents(cursor, tensors)
    return tensors


def _check_extents(cursor: Cursor, tensors: dict[str, TensorInfo]) -> None:
    """All data inside the file, and no two tensors over each other."""
    previous = None
    for info in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if previous and info.offset < previous.offset + previous.nbytes:
            raise cursor.error(f"tensors {quoted(previous.name)} and {quoted(info.name)} overlap")
        previous = info
    whole = previous.offset + previous.nbytes if previous else 0
    if previous and whole > cursor.size:
        raise cursor.error(
            f"truncated: {whole} bytes expected (up to the end of tensor {quoted(previous.name)}), "
            f"{cursor.size} present ({100 * cursor.size // whole} %); if the download still runs "
            "let it finish"
        )
