"""Files that are no GGUF model: each is named for what it is, in one line that says what to do."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from gguf_files import gguf_bytes, small_file
from small_models import write_model

import runtime
from runtime.errors import FileError, ModelError
from runtime.gguf import open_gguf

PAGE = b"<!DOCTYPE html>\n<html><head><title>Qwen3 - Hugging Face</title></head></html>"
POINTER = b"""version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 12345
"""
MODEL = gguf_bytes({"general.architecture": "llama"}, {"w": ((4, 8), 0, np.zeros(32, "<f4"))})


def safetensors() -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(16)


def archive(kind: str) -> bytes:
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as file:
            file.writestr("model.gguf", MODEL)
    else:
        with tarfile.open(fileobj=out, mode="w") as tar:
            info = tarfile.TarInfo("model.gguf")
            info.size = len(MODEL)
            tar.addfile(info, io.BytesIO(MODEL))
    return out.getvalue()


# what was saved as .gguf -> what the message says, and what it advises
SAVED: dict[str, tuple[bytes, str, str]] = {
    "page": (PAGE, "a web page (HTML)", "/resolve/"),
    "page with a mark": (b"\xef\xbb\xbf\r\n " + PAGE.lower(), "a web page (HTML)", "/resolve/"),
    "xml": (b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>", "web page", "download"),
    "pointer": (POINTER, "a git-LFS pointer", "git lfs pull"),
    "error": (b'{"error":"Repository not found"}', 'JSON: \'{"error":"Repository not', "download"),
    "list": (b"[1, 2, 3]", "JSON", "download"),
    "sentence": (b"Entry not found", "a text file: 'Entry not found'", "download"),
    "word": (b"no\n", "a text file: 'no'", "download"),
    "greek": ("\u03b1\u03b2\u03b3 \u03b4\u03b5".encode(), "a text file", "download"),
    "zip": (archive("zip"), "a PyTorch or zip file", "unpack"),
    "tar": (archive("tar"), "a tar archive", "unpack"),
    "gzip": (gzip.compress(MODEL), "compressed with gzip", "unpack"),
    "xz": (lzma.compress(MODEL), "compressed with xz", "unpack"),
    "bzip2": (bz2.compress(MODEL), "compressed with bzip2", "unpack"),
    "pickle": (pickle.dumps({"w": [1.0]}, 2), "PyTorch checkpoint", "convert_hf_to_gguf"),
    "safetensors": (safetensors(), "a safetensors file", "runtime convert"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian", "gguf_convert_endian"),
    "other end": (b"FUGG" + struct.pack(">IQQ", 3, 0, 0), "big-endian", "gguf_convert_endian"),
    "ggjt": (b"tjgg" + bytes(40), "a GGJT file from before GGUF", "current converter"),
    "program": (b"\x7fELF" + bytes(range(200)), "a program", "model's .gguf file"),
    "zeros": (bytes(5000), "filled with zeros", "download it again"),
    "noise": (bytes(range(128, 256)) * 3, "not a GGUF file (it starts with", "model's .gguf"),
    "nothing": (b"", "the file is empty", "download it again"),
    "begun": (MODEL[:30], "the number of tensors", "download"),
    "half": (MODEL[: len(MODEL) - 60], "%)", "let it finish"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAVED)
def test_it_is_named(tmp_path: Path, name: str) -> None:
    raw, what, advice = SAVED[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    with pytest.raises(FileError) as caught:
        runtime.load(path)
    message = str(caught.value)
    assert what in message and advice in message and message.startswith(f"{path}: ")
    assert "\n" not in message and len(message) < len(str(path)) + 300


def test_a_gguf_file_is_none_of_these(tmp_path: Path) -> None:
    assert open_gguf(small_file(tmp_path / "m.gguf")).tensors


def test_a_folder_names_the_files_in_it(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(MODEL)
    with pytest.raises(FileError, match=r"this is a folder; give a file in it: a\.gguf"):
        runtime.load(tmp_path)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    with pytest.raises(FileError, match=r"this is a folder; if it is a checkpoint, 'runtime conv"):
        runtime.load(tmp_path / "hf")


def test_the_second_part_of_a_model_names_the_first(tmp_path: Path) -> None:
    path = tmp_path / "m-00002-of-00003.gguf"
    path.write_bytes(gguf_bytes({"split.no": 1, "split.count": 3}))
    with pytest.raises(FileError, match=r"m-00001-of-00003\.gguf: part 1 of 3 is missing; put all"):
        runtime.load(path)
    path.rename(tmp_path / "second.gguf")
    with pytest.raises(FileError, match=r"one of 3 parts of a split model.*its original name"):
        runtime.load(tmp_path / "second.gguf")


@pytest.mark.parametrize(
    "kind, what",
    [("adapter", "a LoRA adapter"), ("mmproj", "sees or hears"), ("imatrix", "importance matrix")],
)
def test_what_goes_with_a_model_is_no_model(tmp_path: Path, kind: str, what: str) -> None:
    path = write_model(tmp_path / "m.gguf", extra={"general.type": kind})
    with pytest.raises(ModelError, match=f"{what}.*; give the file of the model itself"):
        runtime.load(path)
