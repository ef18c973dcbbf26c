"""A model whose matrices have many block formats in turn: loading, packing, embedding, matmuls."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import gguf_bytes
from small_models import Sizes, metadata, tensors
from tile_calls import random_rows

import runtime

SIZES = Sizes("qwen3moe", layers=2, hidden=256, inner=256, dim=64, experts=4)
FORMATS = ("MXFP4", "Q2_K", "IQ4_XS", "TQ1_0", "Q3_K", "IQ2_XS", "NVFP4", "IQ1_M", "IQ3_XXS")
TOKENS = [*range(1, 12), 5, 6, 7]


def rows_of(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Random bytes of a matrix, or of one for each expert: uint8 [..., rows, row bytes]."""
    raw = random_rows(name, int(np.prod(shape[:-1])), shape[-1], seed)
    if name == "NVFP4":  # any scale would be a thousand times that of the other matrices
        raw.reshape(-1, 36)[:, :4] &= 0x1F
    return raw.reshape(*shape[:-1], -1)


@pytest.fixture(scope="module", params=["iq3_s", "q2_k"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Formats go round from matrix to matrix; the embedding's is the parameter."""
    path = tmp_path_factory.mktemp("formats") / "m.gguf"
    writer = gguf.GGUFWriter(path, SIZES.architecture)
    for key, value in metadata(SIZES).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{SIZES.architecture}.{key}", value)
    writer.add_string("tokenizer.ggml.model", "none")
    count = 0
    for name, values in tensors(SIZES).items():
        if values.ndim == 1 or "gate_inp" in name:
            writer.add_tensor(name, values)
            continue
        kind = FORMATS[count % len(FORMATS)]
        kind, count = (request.param.upper(), count) if "embd" in name else (kind, count + 1)
        raw = rows_of(kind, values.shape, count)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_format_agrees_with_the_reference(path: Path) -> None:
    with runtime.load(path, devices="reference", kv_type="f32") as exact:
        want = exact.eval(TOKENS)
    with runtime.load(path, kv_type="f32", threads=2) as model:
        with model.session() as session:
            got = np.concatenate([session.eval(TOKENS[:-1]), session.eval(TOKENS[-1:])])
        with model.session() as session:
            np.testing.assert_array_equal(session.eval(TOKENS), got)
    assert float(((got - want) ** 2).sum() / (want**2).sum()) <= 5e-3


@pytest.mark.parametrize("name, number", [("Q1_0", 41), ("Q2_0", 42)])
def test_formats_the_gguf_package_may_not_know(tmp_path: Path, name: str, number: int) -> None:
    """Every matrix and the embedding, written byte by byte."""
    size = Sizes("qwen3", layers=1, hidden=128, inner=256, dim=32)
    keys = {f"qwen3.{key}": value for key, value in metadata(size).items()}
    keys |= {"general.architecture": "qwen3", "tokenizer.ggml.model": "none"}
    stored = {}
    for seed, (key, values) in enumerate(tensors(size).items()):
        vector = values.ndim == 1
        data = values if vector else rows_of(name, values.shape, seed)
        stored[key] = (values.shape, 0 if vector else number, data)
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(keys, stored))
    with runtime.load(path, devices="reference", kv_type="f32") as exact:
        want = exact.eval(TOKENS)
    for activations, limit in (("f32", 1e-10), ("int8", 5e-3)):
        with runtime.load(path, kv_type="f32", activations=activations) as model:
            got = model.eval(TOKENS)
        assert float(((got - want) ** 2).sum() / (want**2).sum()) <= limit, activations
