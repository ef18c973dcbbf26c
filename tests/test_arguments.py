"""Arguments of `runtime.load` that cannot be used: one clear line each, before anything is done."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_model import DEMO, needs_demo
from gguf_files import gguf_bytes

import runtime
from runtime.errors import FileError, OptionError

pytestmark = needs_demo


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"path": 3}, "path=3 must be the path of a .gguf file"),
        ({"path": b"m.gguf"}, "path=b'm.gguf' must be"),
        ({"threads": "2"}, "threads='2' must be a whole number, or None"),
        ({"threads": True}, "threads=True must be a whole number"),
        ({"threads": 0}, "threads=0 must be at least 1"),
        ({"context": 1.5}, "context=1.5 must be a whole number, or None"),
        ({"context": -1}, "context=-1 must be at least 1"),
        ({"sequences": None}, "sequences=None must be a whole number"),
        ({"kv_type": 3}, "kv_type=3 must be text such as 'f16'"),
        ({"kv_type": ("f16", 8)}, "kv_type="),
        ({"devices": None}, "devices=None must be text"),
        ({"devices": []}, "devices=[] must be text"),
        ({"devices": ["cpu", 1]}, "devices=['cpu', 1] must be text"),
        ({"split_mode": 1}, "split_mode=1 must be none, layer or tensor"),
        ({"tensor_split": 3}, "tensor_split=3 must be shares, such as '3,1'"),
        ({"tensor_split": {"a": 1}}, "tensor_split={'a': 1} must be shares"),
        ({"main_device": "0"}, "main_device='0' must be a whole number, or None"),
        ({"main_device": -1}, "main_device=-1 must be at least 0"),
        ({"activations": 8}, "activations=8 must be text"),
        ({"progress": "yes"}, "progress='yes' must be True, False or a function"),
    ],
    ids=str,
)
def test_wrong_types_are_named(given: dict, says: str):
    with pytest.raises(OptionError) as caught:
        runtime.load(**({"path": DEMO} | given))
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_paths_and_pairs_and_numpy_numbers_are_taken():
    import numpy as np

    with runtime.load(
        str(DEMO),
        devices="null,null",
        tensor_split=np.array([3, 1]),
        split_mode="tensor",
        kv_type="q8_0/f16",
        context=np.int64(64),
        sequences=1,
    ) as model:
        assert model.kv_types == ("q8_0", "f16") and model.context == 64


def test_a_list_of_devices_is_taken():
    with runtime.load(DEMO, devices=["null", "null"], context=64, sequences=1) as model:
        assert model.backend.name == "null (2 devices)"


def test_a_file_with_a_vocabulary_alone(tmp_path: Path):
    path = tmp_path / "vocab.gguf"
    words = {"general.architecture": "gpt2", "tokenizer.ggml.tokens": ["a", "b"]}
    path.write_bytes(gguf_bytes(words, {}))
    with pytest.raises(FileError, match=r"vocabulary alone \(2 tokens\) and no weights"):
        runtime.load(path)
    path.write_bytes(gguf_bytes({"general.architecture": "gpt2"}, {}))
    with pytest.raises(FileError, match=r"metadata alone and no weights to run$"):
        runtime.load(path)


def test_a_folder_names_the_files_in_it(tmp_path: Path):
    with pytest.raises(FileError, match=r": this is a folder; give the path of a \.gguf file$"):
        runtime.load(tmp_path)
    for name in "dabc":
        (tmp_path / f"{name}.gguf").write_bytes(b"")
    with pytest.raises(FileError, match=r"give a file in it: a.gguf, b.gguf, c.gguf and 1 more$"):
        runtime.load(tmp_path)
