"""Models of metadata alone: the tensors and bytes of the real files, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from small_models import NOVEL, Sizes, write_model

from runtime.errors import FileError, ModelError, OptionError
from runtime.gguf.reader import open_gguf
from runtime.models import outline
from runtime.models.registry import build, one_token

GIB = 1 << 30


@pytest.mark.parametrize(
    ("name", "weights", "gib"),
    [  # sizes of the files as llama.cpp prints them
        ("llama-3.1-70b", "Q3_K_M", 31.91),
        ("llama-3.1-70b", "Q4_K_M", 39.59),
        ("llama-3.1-8b", "Q4_K_M", 4.58),
        ("llama-3.1-8b", "Q8_0", 7.95),
        ("llama-3.1-8b", "Q4_0", 4.33),
        ("gpt-oss-120b", None, 59.02),
        ("qwen3-0.6b", None, 0.59),
        ("qwen3-coder-next-80b", "Q4_K_M", 45.08),
        ("qwen3.5-27b", "Q8_0", 26.64),
        ("qwen3.5-27b", "IQ4_XS", 14.14),
        ("qwen3.5-35b-a3b", "Q8_0", 34.37),
    ],
)
def test_file_bytes_are_those_of_the_real_files(name: str, weights: str | None, gib: float) -> None:
    file = outline.read(outline.known()[name], weights)
    assert file.tensors_nbytes / GIB == pytest.approx(gib, rel=0.01)
    graph = build(file).graph(one_token(build(file)))
    assert len(graph.leaves("weight")) >= len(file.tensors) - 2  # token_embd, rope_freqs


def test_types_are_as_many_as_in_the_real_files() -> None:
    def counts(name: str, weights: str | None) -> dict[str, int]:
        file = outline.read(outline.known()[name], weights)
        return Counter(t.dtype.name for t in file.tensors.values())

    found = counts("llama-3.1-70b", "Q3_K_M")
    assert found == {"f32": 162, "q3_k": 321, "q4_k": 155, "q5_k": 85, "q6_k": 1}
    assert counts("gpt-oss-120b", None) == {"f32": 433, "q8_0": 146, "mxfp4": 108}


@pytest.mark.parametrize("name", ["qwen3", *NOVEL])
def test_metadata_of_a_file_gives_back_its_tensors(name: str, tmp_path: Path) -> None:
    size = NOVEL.get(name, Sizes())
    file = open_gguf(write_model(tmp_path / "m.gguf", size))
    metadata = {**file.metadata, f"{file.architecture}.vocab_size": size.vocabulary}
    found = outline.outline(tmp_path / "m.json", metadata, "F32", tuple(file.tensors))
    assert {n: t.shape for n, t in found.tensors.items()} == {
        n: t.shape for n, t in file.tensors.items()
    }
    assert found.tensors_nbytes == file.tensors_nbytes
    assert str(build(found).graph(one_token(build(found)))) == str(
        build(file).graph(one_token(build(file)))
    )


def test_a_name_is_found_with_and_without_type_and_ending() -> None:
    path = outline.known()["qwen3.5-27b"]
    assert outline.find("qwen3.5-27b") == (path, None)
    assert outline.find("models/Qwen3.5-27B.gguf") == (path, None)
    assert outline.find("Qwen3.5-27B-Q8_0.gguf") == (path, "q8_0")
    assert outline.find("qwen3.5-27bb") is None
    assert outline.find("qwen9") is None


def test_toml_and_nested_tables_are_read(tmp_path: Path) -> None:
    plain = json.loads(outline.known()["llama-3.1-8b"].read_text())
    lines = [f'weights = "Q4_0"\ntensors = {plain["tensors"]}\n[general]\narchitecture = "llama"']
    lines.append("[llama]")
    lines += [f"{k.removeprefix('llama.')} = {v}" for k, v in plain.items() if "llama." in k]
    path = tmp_path / "a.toml"
    path.write_text("\n".join(lines))
    assert outline.read(path).tensors_nbytes / GIB == pytest.approx(4.33, rel=0.01)


def test_what_cannot_be_read_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("{")
    with pytest.raises(FileError, match=r"a\.json: cannot be read as metadata"):
        outline.read(path)
    path.write_text("[1]")
    with pytest.raises(FileError, match="a table of keys and values"):
        outline.read(path)
    path.write_text('{"general.architecture": "gpt2"}')
    with pytest.raises(ModelError, match="'gpt2' is not supported"):
        outline.read(path)
    path.write_text('{"general.architecture": "llama", "llama.vocab_size": 100}')
    with pytest.raises(ModelError, match=r"llama\.embedding_length is missing"):
        outline.read(path)
    with pytest.raises(OptionError, match=r"weight type 'Q9' is not known; there are .*Q4_K_M"):
        outline.read(outline.known()["qwen3-0.6b"], "Q9")
    file = outline.read(outline.known()["qwen3-0.6b"])
    with pytest.raises(FileError, match="metadata alone"):
        file.tensors["token_embd.weight"].read(0, None)
