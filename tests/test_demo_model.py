"""The bundled model file: small, complete, readable, and good at the text it was made for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest

PATH = Path(__file__).resolve().parents[1] / "runtime" / "data" / "demo.gguf"


@pytest.fixture(scope="module")
def reader() -> gguf.GGUFReader:
    return gguf.GGUFReader(PATH)


def test_it_fits_into_the_wheel() -> None:
    assert PATH.stat().st_size <= 6_000_000


def test_description(reader: gguf.GGUFReader) -> None:
    def value(key: str) -> Any:
        return reader.fields[key].contents()

    assert value("general.architecture") == "qwen3"
    assert value("general.name") == "Demo stories"
    assert value("general.license") == "mit"
    assert value("tokenizer.ggml.pre") == "qwen2"
    tokens = value("tokenizer.ggml.tokens")
    assert tokens[value("tokenizer.ggml.eos_token_id")] == "<|im_end|>"
    assert "<|im_start|>" in str(value("tokenizer.chat_template"))


def test_it_was_trained(reader: gguf.GGUFReader) -> None:
    loss = reader.fields["demo.heldout_loss"].contents()
    assert isinstance(loss, float) and 0 < loss < 0.6


def test_every_matrix_can_be_quantised(reader: gguf.GGUFReader) -> None:
    """K-quants cut rows into blocks of 256."""
    for tensor in reader.tensors:
        if len(tensor.shape) == 2:
            assert tensor.shape[0] % 256 == 0, tensor.name
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F16, tensor.name
