"""Damaged and malicious files: each gives one clear line, none crashes, hangs or fills memory."""

from __future__ import annotations

import os
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf_files import ARRAY, STRING, Typed, gguf_bytes, header, padded, small_file, string

from runtime.errors import FileError, ModelError
from runtime.gguf import open_gguf

HUGE = [2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]


def refusal(path: Path, raw: bytes) -> str:
    """The message of the FileError that this content gives."""
    path.write_bytes(raw)
    with pytest.raises(FileError) as caught:
        open_gguf(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 2000
    return message


def one_tensor(shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return padded(header({}, [("w", shape, kind, offset)])) + bytes(64)


def key_value(kind: int, body: bytes) -> bytes:
    return header({}, n_keys=1) + string("key") + struct.pack("<I", kind) + body


FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "short": (b"GGUF", "4 bytes are too few"),
    "magic": (header({}, magic=b"ABCD"), "not a GGUF file (it starts with b'ABCD')"),
    "ggjt": (header({}, magic=b"tjgg"), "GGJT file from before GGUF"),
    "torch": (header({}, magic=b"PK\x03\x04"), "PyTorch or zip"),
    "version 1": (header({}, version=1), "GGUF version 1 is not supported (versions 2 and 3 are)"),
    "version 9": (header({}, version=9), "GGUF version 9"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "big-endian magic": (b"FUGG" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "cut header": (header({})[:12], "the number of tensors: 8 bytes expected at byte 8, 4 present"),
    "key twice": (
        header({"a": 1}, n_keys=2) + header({"a": 1})[24:], "metadata key 'a' occurs twice"
    ),
    "key not text": (header({}, n_keys=1) + string(b"\xff") + bytes(9), "is not UTF-8"),
    "value type": (key_value(13, bytes(8)), "'key' has the unknown type 13"),
    "element type": (key_value(9, struct.pack("<IQ", 99, 0)), "elements of the unknown type 99"),
    "nesting": (key_value(9, struct.pack("<IQ", 9, 1) * 9), "nests arrays more than 4 deep"),
    "array cut": (key_value(9, struct.pack("<IQ", 4, 5) + bytes(8)), "needs at least 20 bytes"),
    "strings cut": (key_value(9, struct.pack("<IQQ", 8, 1, 5)), "run past the end of the file"),
    "no power": (header({"general.alignment": 48}), "must be a power of two, found '48'"),
    "zero alignment": (header({"general.alignment": 0}), "must be a power of two, found '0'"),
    "text alignment": (header({"general.alignment": "a\nb"}), r"found 'a\nb'"),
    "many dims": (one_tensor((1, 1, 1, 1, 1)), "'w' has 5 dimensions, at most 4"),
    "wide dims": (one_tensor((2**40, 2**40)), "impossible shape"),
    "type": (one_tensor(kind=31), "'w': unknown tensor type 31; supported types: f32 (0)"),
    "ragged row": (one_tensor((2, 33), kind=8), "must be a multiple of 32"),
    "unaligned": (one_tensor(offset=4), "no multiple of the alignment 32"),
    "past the end": (one_tensor(offset=2**40), "truncated"),
    "large": (one_tensor((2**30,)), "(up to the end of tensor 'w')"),
    "twice": (
        padded(header({}, [("w", (4,), 0, 0), ("w", (4,), 0, 32)])) + bytes(64), "'w' occurs twice"
    ),
    "overlap": (
        padded(header({}, [("v", (8,), 0, 32), ("w", (9,), 0, 0)])) + bytes(64),
        "tensors 'w' and 'v' overlap",
    ),
    "long name": (
        header({}, n_tensors=1) + struct.pack("<Q", 70_000) + bytes(80_000),
        "a tensor name is 70000 bytes long, more than the 65535 allowed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_is_named(tmp_path: Path, name: str) -> None:
    raw, words = FAULTS[name]
    assert words in refusal(tmp_path / "bad.gguf", raw)


@pytest.mark.parametrize("count", HUGE)
def test_huge_counts_allocate_nothing(tmp_path: Path, count: int) -> None:
    path = tmp_path / "bad.gguf"
    number = struct.pack("<Q", count)
    assert "number of tensors is" in refusal(path, header({}, n_tensors=count) + bytes(100))
    assert "number of metadata keys" in refusal(path, header({}, n_keys=count) + bytes(100))
    assert "metadata key is" in refusal(path, header({}, n_keys=1) + number + bytes(100))
    assert "'key'" in refusal(path, key_value(STRING, number + bytes(100)))
    for element in (0, 5, STRING, ARRAY, 12):
        body = struct.pack("<I", element) + number + bytes(100)
        assert "'key'" in refusal(path, key_value(ARRAY, body))
    body = struct.pack("<IQ", STRING, 1) + number + bytes(100)
    assert "past the end" in refusal(path, key_value(ARRAY, body))
    assert "'w'" in refusal(path, one_tensor((min(count, 2**64 - 1),)))


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    raw = small_file(tmp_path / "good.gguf").read_bytes()
    for size in range(1, len(raw) - 24):  # the last tensor's padding may be missing
        refusal(tmp_path / "bad.gguf", raw[:size])


def test_a_truncated_file_says_how_much_is_missing(tmp_path: Path) -> None:
    raw = gguf_bytes({}, {"w": ((1000,), 0, np.zeros(1000, "<f4"))})
    message = refusal(tmp_path / "bad.gguf", raw[:2000])
    assert f"{len(raw)} bytes expected" in message and "2000 present" in message


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such file"):
        open_gguf(tmp_path / "none.gguf")
    with pytest.raises(FileError, match="is a folder"):
        open_gguf(tmp_path)
    for name in ("a\0b", "x" * 5000):
        with pytest.raises(FileError):
            open_gguf(tmp_path / name)


@pytest.mark.skipif(sys.platform == "win32", reason="modes do not forbid reading there")
def test_unreadable_and_special_files(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(FileError, match="is not a file"):
        open_gguf(pipe)
    path = small_file(tmp_path / "m.gguf")
    path.chmod(0)
    if not os.access(path, os.R_OK):
        with pytest.raises(FileError, match="cannot be read"):
            open_gguf(path)


def test_a_missing_or_odd_architecture(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for metadata in ({}, {"general.architecture": 3}):
        path.write_bytes(gguf_bytes(metadata))
        with pytest.raises(FileError, match=r"no general\.architecture"):
            _ = open_gguf(path).architecture


Mutation = Callable[[bytearray, np.random.Generator], None]


def flip_bits(raw: bytearray, rng: np.random.Generator) -> None:
    for _ in range(rng.integers(1, 9)):
        raw[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))


def overwrite_bytes(raw: bytearray, rng: np.random.Generator) -> None:
    start = int(rng.integers(len(raw)))
    length = int(rng.integers(1, 17))
    raw[start : start + length] = rng.bytes(length)


def truncate(raw: bytearray, rng: np.random.Generator) -> None:
    del raw[int(rng.integers(len(raw))) :]


def huge_number(raw: bytearray, rng: np.random.Generator) -> None:
    start = int(rng.integers(len(raw) - 8))
    raw[start : start + 8] = struct.pack("<Q", HUGE[rng.integers(len(HUGE))])


def small_number(raw: bytearray, rng: np.random.Generator) -> None:
    start = int(rng.integers(len(raw) - 4))
    raw[start : start + 4] = struct.pack("<I", int(rng.integers(64)))


def swap_fields(raw: bytearray, rng: np.random.Generator) -> None:
    a, b = (int(n) for n in rng.integers(len(raw) - 8, size=2))
    raw[a : a + 8], raw[b : b + 8] = raw[b : b + 8], raw[a : a + 8]


def repeat_piece(raw: bytearray, rng: np.random.Generator) -> None:
    start, at = (int(n) for n in rng.integers(len(raw), size=2))
    raw[at:at] = raw[start : start + int(rng.integers(1, 100))]


def drop_piece(raw: bytearray, rng: np.random.Generator) -> None:
    start = int(rng.integers(len(raw)))
    del raw[start : start + int(rng.integers(1, 40))]


MUTATIONS: list[Mutation] = [
    flip_bits,
    overwrite_bytes,
    truncate,
    huge_number,
    small_number,
    swap_fields,
    repeat_piece,
    drop_piece,
]


def use_everything(path: Path) -> None:
    """Open the file and touch all that its header promises."""
    file = open_gguf(path)
    for value in file.metadata.values():
        if not isinstance(value, str):
            repr(list(value) if hasattr(value, "__len__") else value)
    assert isinstance(file.architecture, str)
    for tensor in file.tensors.values():
        tensor.to_float32()


@pytest.mark.timeout(60)
def test_two_thousand_mutated_headers(tmp_path: Path) -> None:
    metadata = {"split.count": Typed(2, 0), "nested": Typed(ARRAY, ["x"] * 3, element=STRING)}
    good = small_file(tmp_path / "good.gguf").read_bytes()
    extra = gguf_bytes({"general.architecture": "qwen3"} | metadata, {"w": ((4,), 0, bytes(16))})
    path = tmp_path / "mutated.gguf"
    opened, refused, start = 0, 0, time.process_time()
    for seed in range(2000):
        rng = np.random.default_rng(seed)
        raw = bytearray((good, extra)[seed % 2])
        for _ in range(rng.integers(1, 4)):
            if len(raw) > 16:
                MUTATIONS[rng.integers(len(MUTATIONS))](raw, rng)
        path.write_bytes(raw)
        try:
            use_everything(path)
            opened += 1
        except (FileError, ModelError) as error:
            message = str(error)
            assert "\n" not in message and str(path.parent) in message, (seed, message)
            refused += 1
    assert opened > 100 and refused > 1000
    assert time.process_time() - start < 20
