"""Importance matrix files: both formats, what they mean, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from small_models import Sizes, write_model

from runtime.errors import FileError
from runtime.gguf.reader import open_gguf
from runtime.gguf.writer import NewTensor, write_gguf
from runtime.ops.dtypes import F32
from runtime.quantise.imatrix_file import Entry, Imatrix, read, write

_RNG = np.random.default_rng(0)
EXPERTS = Entry(
    _RNG.random((3, 8), np.float32), np.array([2, 0, 5], np.float32),
    _RNG.random((3, 8), np.float32), np.arange(2, dtype=np.float32),
)  # fmt: skip
PLAIN = Entry(_RNG.random((1, 4), np.float32), np.array([7], np.float32))


def dat(*entries: tuple[str, int, np.ndarray], end: bytes = b"") -> bytes:
    """The older format, as llama.cpp wrote it."""
    raw = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        raw += struct.pack("<i", len(name)) + name.encode()
        raw += struct.pack("<ii", calls, values.size) + values.astype("<f4").tobytes()
    return raw + end


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    write(path, Imatrix({"b": EXPERTS, "a": PLAIN}, ["x.txt", "y.txt"], 6, 64, ["mean", "gain"]))
    found = read(path)
    assert (found.datasets, found.chunks, found.chunk_tokens) == (("x.txt", "y.txt"), 6, 64)
    assert found.schema == ("mean", "gain")
    assert [*found.entries] == ["a", "b"]
    for name in ("squares", "counts", "sums", "stats"):
        np.testing.assert_array_equal(getattr(found.entries["b"], name), getattr(EXPERTS, name))
    shapes = {name: t.shape for name, t in open_gguf(path).tensors.items()}
    assert shapes == {
        "a.in_sum2": (4,), "a.counts": (1,), "b.in_sum2": (3, 8), "b.counts": (3, 1),
        "b.in_sum": (3, 8), "b.stats": (2,),
    }  # fmt: skip


def test_means_are_per_matrix_and_one_where_nothing_was_seen() -> None:
    means = EXPERTS.mean_squares
    np.testing.assert_array_equal(means[0], EXPERTS.squares[0] / np.float32(2))
    np.testing.assert_array_equal(means[1], 1)
    np.testing.assert_array_equal(means[2], EXPERTS.squares[2] / np.float32(5))


def test_the_older_format(tmp_path: Path) -> None:
    values, path = np.arange(1, 7, dtype=np.float32), tmp_path / "i.dat"
    end = struct.pack("<ii", 9, 5) + b"t.txt"
    path.write_bytes(dat(("a", 3, values), ("b", 0, values[:2]), end=end))
    found = read(path)
    np.testing.assert_array_equal(found.entries["a"].mean_squares, values[None] / np.float32(3))
    np.testing.assert_array_equal(found.entries["b"].mean_squares, [[1, 2]])
    assert (found.datasets, found.chunks) == (("t.txt",), 9)
    path.write_bytes(dat(("a", 3, values)))
    assert read(path).chunks == 0


def test_what_is_no_importance_matrix_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    whole = dat(("a", 3, np.arange(6.0)))
    for raw in (b"", b"some text that is long enough", whole[:-3], struct.pack("<i", 0)):
        path.write_bytes(raw)
        with pytest.raises(FileError, match="importance matrix"):
            read(path)
    path.write_bytes(dat(("a", 1, np.array([1, np.nan]))))
    with pytest.raises(FileError, match="entry of a is not finite"):
        read(path)
    path.write_bytes(dat(("a", 1, np.array([1, -1]))))
    with pytest.raises(FileError, match=r"i\.dat: the entry of a has negative numbers"):
        read(path)
    with pytest.raises(FileError, match="is a model's file"):
        read(write_model(tmp_path / "m.gguf", Sizes()))
    squares = NewTensor.of("a.in_sum2", (4,), F32, np.ones(4, "<f4"))
    write_gguf(path, {"general.type": "imatrix"}, [squares])
    with pytest.raises(FileError, match=r"a\.counts is missing"):
        read(path)
    counts = NewTensor.of("a.counts", (3,), F32, np.ones(3, "<f4"))
    write_gguf(path, {"general.type": "imatrix"}, [squares, counts])
    with pytest.raises(FileError, match="sums and counts of a do not match"):
        read(path)
    with pytest.raises(FileError, match="cannot be read"):
        read(tmp_path / "none")
