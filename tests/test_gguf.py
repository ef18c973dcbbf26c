"""The GGUF reader and writer: values, views, strings, split files, speed and laziness."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import ARRAY, STRING, Typed, gguf_bytes, header, padded, small_file, small_metadata

import runtime
from runtime.errors import FileError
from runtime.gguf import open_gguf
from runtime.gguf.writer import NewTensor, write_gguf
from runtime.ops.dtypes import BF16, F16, F32, Q8_0, U8

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


@pytest.mark.parametrize("version", [2, 3])
def test_every_metadata_type_is_read(tmp_path: Path, version: int) -> None:
    file = open_gguf(small_file(tmp_path / "m.gguf", version=version))
    assert (file.version, file.architecture) == (version, "llama")
    for key, value in small_metadata().items():
        expected = value.value if isinstance(value, Typed) else value
        found = file.metadata[key]
        assert list(found) == expected if isinstance(expected, list) else found == expected, key
    assert file.metadata["scalar.7"] is True
    assert file.metadata["flags"].dtype == bool
    assert file.metadata["tokenizer.ggml.token_type"].dtype == np.int32
    assert file.get("no.such.key", 7) == 7


def test_tensors_are_in_numpy_order(tmp_path: Path) -> None:
    file = open_gguf(small_file(tmp_path / "m.gguf"))
    assert list(file.tensors) == ["matrix", "vector", "blocks"]
    matrix, vector, blocks = file.tensors.values()
    assert (matrix.shape, matrix.dtype, matrix.nbytes) == ((3, 4), F32, 48)
    assert (vector.dtype, blocks.dtype, blocks.shape) == (F16, Q8_0, (2, 64))
    assert np.array_equal(matrix.array(), np.arange(12).reshape(3, 4))
    assert np.array_equal(blocks.data, np.arange(136, dtype=np.uint8))
    assert file.path.read_bytes()[vector.offset :][:10] == vector.data.tobytes()
    assert vector.to_float32().tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(FileError, match="q8_0, a block format"):
        blocks.array()


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes({}, {"scalar": ((), 0, b"\0\0\x80?"), "none": ((0, 4), 0, b"")}))
    tensors = open_gguf(path).tensors
    assert tensors["scalar"].array() == 1 and tensors["none"].array().shape == (0, 4)


def test_another_alignment(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tensors = {"a": ((3,), 24, b"abc"), "b": ((2,), 24, b"de")}
    path.write_bytes(gguf_bytes({"general.alignment": 8}, tensors, alignment=8))
    found = open_gguf(path).tensors
    assert found["b"].data.tobytes() == b"de" and found["b"].offset % 8 == 0


def test_values_outlive_the_file(tmp_path: Path) -> None:
    data = open_gguf(small_file(tmp_path / "m.gguf")).tensors["matrix"].array()
    assert data.sum() == 66


@pytest.mark.skipif(sys.platform == "win32", reason="the file would not be sparse")
def test_opening_reads_no_data(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    rows = 1 << 20
    path.write_bytes(padded(header({}, [("w", (rows, 1024), 0, 0)])))
    os.truncate(path, path.stat().st_size + rows * 4096)
    tensor = open_gguf(path).tensors["w"]
    last = tensor.read((rows - 1) * 4096, np.full(4096, 1, np.uint8))
    assert tensor.nbytes == rows * 4096 and not last.any()


class TestStrings:
    """Arrays of strings decode one by one and all at once, to the same text."""

    @staticmethod
    def strings(tmp_path: Path, values: list[bytes]):
        path = tmp_path / "s.gguf"
        path.write_bytes(gguf_bytes({"s": Typed(ARRAY, values, element=STRING)}))
        return open_gguf(path).metadata["s"]

    def test_sequence_protocol(self, tmp_path: Path) -> None:
        found = self.strings(tmp_path, [b"one", b"", "zwölf".encode(), b"x" * 300])
        assert len(found) == 4 and found[0] == "one" and found[-2] == "zwölf"
        assert found[1:3] == ["", "zwölf"] and "one" in found and found.index("") == 1
        assert list(found) == [found[i] for i in range(4)] == found.tolist()
        with pytest.raises(IndexError):
            found[4]

    def test_bytes_that_are_not_utf8_are_kept(self, tmp_path: Path) -> None:
        values = [b"\xff\xfe", b"a\xc3", b"\xa9b", b"ok"]
        found = self.strings(tmp_path, values)
        assert [found.raw(i) for i in range(4)] == values
        assert [text.encode("utf-8", "surrogateescape") for text in found] == values
        assert list(found) == [found[i] for i in range(4)]

    @pytest.mark.parametrize("used", [b"\x00", b"\x00\x01", b"\x00\x01\x1e\x1f\n"])
    def test_any_control_character_may_occur(self, tmp_path: Path, used: bytes) -> None:
        values = [bytes([byte]) for byte in used] + [used, b"", b"a" + used + b"b"]
        assert list(self.strings(tmp_path, values)) == [value.decode() for value in values]

    def test_empty(self, tmp_path: Path) -> None:
        found = self.strings(tmp_path, [])
        assert len(found) == 0 and list(found) == []


def test_nested_arrays(tmp_path: Path) -> None:
    inner = struct.pack("<IQ2I", 4, 2, 5, 6)
    body = struct.pack("<IQ", 9, 1) + inner
    raw = header({}, n_keys=1) + struct.pack("<Q", 1) + b"k" + struct.pack("<I", 9) + body
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    assert [list(array) for array in open_gguf(path).metadata["k"]] == [[5, 6]]


def test_what_we_write_the_gguf_package_reads(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    metadata = {
        "general.architecture": "llama", "i": 3, "n": -3, "big": 1 << 40, "f": 0.25, "b": True,
        "ints": [1, -2], "floats": np.arange(3, dtype=np.float64), "s": ["a", "", "é"],
        "wide": [1 << 40], "flags": [True, False], "half": np.int16(-5),
    }  # fmt: skip
    values = np.arange(6, dtype="<f4").reshape(2, 3)
    bits = np.array([0x3F80, 0xC000], "<u2")
    tensors = [NewTensor.of("w", (2, 3), F32, values), NewTensor.of("h", (2,), BF16, bits)]
    seen: list[int] = []
    write_gguf(path, metadata, tensors, seen.append)
    theirs, ours = gguf.GGUFReader(path), open_gguf(path)
    for key, value in metadata.items():
        assert np.array_equal(theirs.fields[key].contents(), value), key
        assert np.array_equal(list(np.atleast_1d(ours.metadata[key])), np.atleast_1d(value)), key
    assert np.array_equal(theirs.tensors[0].data, values)
    assert ours.tensors["h"].to_float32().tolist() == [1, -2]
    assert seen == [24, 4] and list(tmp_path.iterdir()) == [path]


def test_a_copied_vocabulary_is_the_same(tmp_path: Path) -> None:
    first = open_gguf(small_file(tmp_path / "a.gguf"))
    write_gguf(tmp_path / "b.gguf", first.metadata, [])
    second = open_gguf(tmp_path / "b.gguf")
    assert list(second.metadata["tokenizer.ggml.tokens"]) == [
        "<s>",
        "a",
        "",
        "b\nc",
        "\N{GREEK SMALL LETTER ALPHA}",
    ]


@pytest.mark.parametrize("name", ["missing/m.gguf", "m.gguf"])
def test_writing_fails_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "m.gguf").mkdir()
    with pytest.raises(FileError, match="cannot be written"):
        write_gguf(tmp_path / name, {}, [])


def test_wrong_data_size_and_type_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"w f32 \[3\] takes 12 bytes, 4 given"):
        write_gguf(tmp_path / "m", {}, [NewTensor.of("w", (3,), F32, np.zeros(1, "<f4"))])
    with pytest.raises(FileError, match="u8 cannot be stored"):
        write_gguf(tmp_path / "m", {}, [NewTensor.of("w", (1,), U8, np.zeros(1, "u1"))])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden data beside the checkout")
@pytest.mark.parametrize("name", ["qwen3/model-Q4_K_M.gguf", "qwen35moe/model-MXFP4_MOE.gguf"])
def test_golden_files_read_as_by_the_gguf_package(name: str) -> None:
    theirs, ours = gguf.GGUFReader(GOLDEN / name), open_gguf(GOLDEN / name)
    assert set(ours.metadata) == {key for key in theirs.fields if not key.startswith("GGUF.")}
    for key, found in ours.metadata.items():
        expected = theirs.fields[key].contents()
        assert list(found) == list(expected) if isinstance(expected, list) else found == expected
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(int(n) for n in reversed(tensor.shape))
        assert mine.offset == tensor.data_offset
        assert np.array_equal(mine.data, np.asarray(tensor.data).view(np.uint8).ravel())


class TestSplit:
    """Models in several files."""

    @staticmethod
    def parts(folder: Path, count: int = 3, total: int | None = None) -> list[Path]:
        paths = []
        for number in range(count):
            metadata = {
                "split.no": Typed(2, number),
                "split.count": Typed(2, count),
                "split.tensors.count": Typed(5, count if total is None else total),
            }
            first = {"general.architecture": "llama"} if number == 0 else {}
            tensors = {f"w{number}": ((2,), 0, np.full(2, number, "<f4"))}
            path = folder / f"model-{number + 1:05d}-of-{count:05d}.gguf"
            path.write_bytes(gguf_bytes(first | metadata, tensors))
            paths.append(path)
        return paths

    def test_any_part_opens_all(self, tmp_path: Path) -> None:
        paths = self.parts(tmp_path)
        for path in paths:
            file = open_gguf(path)
            assert file.path == paths[0] and file.architecture == "llama"
            assert [t.to_float32()[0] for t in file.tensors.values()] == [0, 1, 2]
            assert file.tensors["w2"].path == paths[2]
            assert file.nbytes == sum(path.stat().st_size for path in paths)

    def test_missing_part_is_named(self, tmp_path: Path) -> None:
        paths = self.parts(tmp_path)
        paths[1].unlink()
        with pytest.raises(FileError, match=r"00002-of-00003.*part 2 of 3 is missing"):
            open_gguf(paths[2])

    def test_renamed_parts(self, tmp_path: Path) -> None:
        paths = self.parts(tmp_path)
        other = paths[0].rename(tmp_path / "other.gguf")
        with pytest.raises(FileError, match="give it its original name"):
            open_gguf(other)
        other.rename(paths[0])
        paths[1].replace(paths[2])
        paths[1].write_bytes(paths[0].read_bytes())
        with pytest.raises(FileError, match="metadata says part 0 of 3"):
            open_gguf(paths[0])

    def test_tensor_count_must_agree(self, tmp_path: Path) -> None:
        with pytest.raises(FileError, match="hold 3 tensors, 5 are announced"):
            open_gguf(self.parts(tmp_path, total=5)[0])

    def test_same_tensor_twice(self, tmp_path: Path) -> None:
        paths = self.parts(tmp_path)
        paths[1].write_bytes(paths[1].read_bytes().replace(b"w1", b"w0"))
        with pytest.raises(FileError, match=r"'w0' is in .*00001-of-00003\.gguf too"):
            open_gguf(paths[0])

    def test_nonsense_split_metadata(self, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        for value in ([2, 3], "three", 2.0, True):
            path.write_bytes(gguf_bytes({"split.count": value}))
            with pytest.raises(FileError, match=r"split\.count must be a whole number"):
                open_gguf(path)


def test_a_large_vocabulary_opens_fast(tmp_path: Path) -> None:
    tokens = [f"token{i}".encode() for i in range(151_936)]
    merges = [f"tok{i} en{i}".encode() for i in range(151_387)]
    metadata = {
        "tokenizer.ggml.tokens": Typed(ARRAY, tokens, element=STRING),
        "tokenizer.ggml.merges": Typed(ARRAY, merges, element=STRING),
        "tokenizer.ggml.token_type": Typed(ARRAY, [1] * len(tokens), element=5),
    }
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(metadata))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        file = open_gguf(path)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5
    assert file.metadata["tokenizer.ggml.merges"][-1] == "tok151386 en151386"
    assert file.metadata["tokenizer.ggml.tokens"].tolist()[-1] == "token151935"


def test_reading_imports_neither_gguf_nor_numba(tmp_path: Path) -> None:
    path = small_file(tmp_path / "m.gguf")
    program = (
        "import sys; from runtime.gguf import open_gguf; "
        "open_gguf(sys.argv[1]).tensors['blocks'].to_float32(); "
        "print([m for m in ('gguf', 'numba', 'llvmlite', 'tokenizers') if m in sys.modules])"
    )
    root = Path(runtime.__file__).resolve().parent.parent
    command = [sys.executable, "-c", program, str(path)]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
