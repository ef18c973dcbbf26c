"""`scripts/make_random_model.py`: shapes, types, spread of the weights and the command line."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner
from gguf_files import small_file

import runtime
from runtime.gguf import GGUFFile, open_gguf
from runtime.ops.tensor import stored_name

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "make_random_model.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_random_model", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def make(script: ModuleType, path: Path, *arguments: str) -> GGUFFile:
    result = CliRunner().invoke(script.main, [*arguments[:2], str(path), *arguments[2:]])
    assert result.exit_code == 0, result.output
    return open_gguf(path)


def test_qwen3_has_the_real_shapes(script: ModuleType, tmp_path: Path) -> None:
    small = ("--layers", "2", "--vocab-size", "300")
    file = make(script, tmp_path / "m.gguf", "qwen3-0.6b", "Q4_0", *small)
    assert file.architecture == "qwen3" and file.get("qwen3.block_count") == 2
    assert file.get("tokenizer.ggml.model") == "none" and file.get("qwen3.vocab_size") == 300
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    assert shapes["token_embd.weight"] == (300, 1024) and "output.weight" not in shapes
    assert shapes["blk.1.attn_q.weight"] == (2048, 1024)
    assert shapes["blk.1.attn_k.weight"] == (1024, 1024)
    assert shapes["blk.1.ffn_down.weight"] == (1024, 3072)
    assert shapes["blk.1.attn_q_norm.weight"] == (128,)
    assert len(shapes) == 2 + 2 * 11
    types = {tensor.dtype.name for tensor in file.tensors.values()}
    assert types == {"f32", "q4_0", "q6_k"}  # the tied output matrix gets 6 bits


def test_llama_has_rope_factors_and_no_head_norms(script: ModuleType, tmp_path: Path) -> None:
    small = ("--layers", "1", "--vocab-size", "256")
    file = make(script, tmp_path / "m.gguf", "llama-1b", "Q8_0", *small)
    factors = file.tensors["rope_freqs.weight"].array()
    assert factors.shape == (32,) and factors[0] == 1 and factors[-1] == 32
    assert (np.diff(factors) >= 0).all()
    assert not any("q_norm" in name for name in file.tensors)
    assert file.tensors["token_embd.weight"].dtype.name == "q8_0"


def test_the_mix_spends_bits_where_llama_quantize_does(script: ModuleType) -> None:
    preset = script.PRESETS["qwen3-0.6b"]
    kinds = {name: dtype.name for name, dtype in script.types_of(preset, "Q4_K_M").items()}
    assert kinds["token_embd.weight"] == kinds["blk.0.ffn_down.weight"] == "q6_k"
    assert kinds["blk.3.ffn_down.weight"] == kinds["blk.0.attn_q.weight"] == "q4_k"
    assert kinds["blk.5.attn_v.weight"] == "q6_k" and kinds["blk.5.attn_norm.weight"] == "f32"


@pytest.mark.parametrize(
    "preset", ["qwen35-0.8b", "qwen35moe-mini", "qwen3next-mini", "gpt-oss-mini"]
)
def test_presets_of_newer_models_load(script: ModuleType, tmp_path: Path, preset: str) -> None:
    """Names, shapes and keys are what the model files ask for."""
    small = ("--layers", "4", "--vocab-size", "300")
    file = make(script, tmp_path / "m.gguf", preset, "MXFP4_MOE", *small)
    with runtime.load(file.path, devices="null") as model:
        assert model.architecture == script.PRESETS[preset].architecture
        used = {stored_name(leaf) for leaf in model.graph(1).leaves("weight")}
    assert used == set(file.tensors)
    kinds = {len(t.shape): set() for t in file.tensors.values()}
    for tensor in file.tensors.values():
        kinds[len(tensor.shape)].add(tensor.dtype.name)
    assert kinds[1] == {"f32"} and kinds.get(3, {"mxfp4"}) == {"mxfp4"} and "q8_0" in kinds[2]


@pytest.mark.parametrize("preset", ["qwen35-0.8b", "qwen35moe-mini"])
def test_a_block_that_predicts_a_further_token(
    script: ModuleType, tmp_path: Path, preset: str
) -> None:
    small = ("--layers", "4", "--vocab-size", "300", "--mtp")
    file = make(script, tmp_path / "m.gguf", preset, "Q4_K_M", *small)
    assert file.get(f"{file.architecture}.block_count") == 5
    with runtime.load(file.path, devices="null", spec="mtp") as model:
        graphs = model._engine.graphs
        found = [*graphs.graph(1, 1).leaves("weight"), *graphs.drafts(1, 1).leaves("weight")]
    assert {stored_name(leaf) for leaf in found} == set(file.tensors)
    refused = CliRunner().invoke(
        script.main, ["qwen3-0.6b", "Q4_0", str(tmp_path / "x.gguf"), "--mtp"]
    )
    assert refused.exit_code == 2 and "no such block" in refused.output


def test_qwen35_has_the_real_shapes(script: ModuleType) -> None:
    preset = script.PRESETS["qwen35-0.8b"]
    slots = {slot.name: slot for slot in preset.tensors(preset)}
    kinds = {name: dtype.name for name, dtype in script.types_of(preset, "Q4_K_M").items()}
    assert slots["blk.3.attn_q.weight"].shape == (2 * 8 * 256, 1024)
    assert slots["blk.0.attn_qkv.weight"].shape == (3 * 16 * 128, 1024)
    assert slots["blk.0.ssm_conv1d.weight"].shape == (3 * 16 * 128, 4)
    assert "blk.2.attn_q.weight" not in slots and "blk.23.ssm_a" not in slots
    assert kinds["blk.0.ssm_conv1d.weight"] == kinds["blk.0.ssm_a"] == "f32"
    assert kinds["blk.0.ssm_alpha.weight"] == kinds["blk.4.attn_qkv.weight"] == "q4_k"
    assert kinds["blk.0.attn_qkv.weight"] == "q6_k"


def test_every_type_has_values_of_the_right_spread(script: ModuleType) -> None:
    for name in script.WEIGHT_TYPES:
        dtype = script.DTYPES[name.lower()]
        slot = script.Slot("w", (64, 1024), "matrix")
        tensor = script.new_tensor(slot, dtype, script.PRESETS["qwen3-0.6b"], 1)
        raw = np.concatenate(list(tensor.chunks()))
        values = script.dequantize(raw, dtype, slot.shape) * 32
        assert raw.size == tensor.nbytes and np.isfinite(values).all(), name
        assert 0.8 < values.std() < 1.25 and abs(values.mean()) < 0.2, name
        assert len({row.tobytes() for row in values}) == 64, name


def test_seeds_and_copied_vocabularies(script: ModuleType, tmp_path: Path) -> None:
    source = small_file(tmp_path / "vocab.gguf")
    common = ("llama-1b", "BF16", "--layers", "1", "--vocab-from", str(source))
    first = make(script, tmp_path / "a.gguf", *common)
    second = make(script, tmp_path / "b.gguf", *common, "--seed", "1")
    assert first.get("tokenizer.ggml.tokens")[3] == "b\nc" and first.get("llama.vocab_size") == 5
    name = "blk.0.attn_q.weight"
    assert not np.array_equal(first.tensors[name].data, second.tensors[name].data)
    again = make(script, tmp_path / "c.gguf", *common)
    assert np.array_equal(first.tensors[name].data, again.tensors[name].data)


def test_mistakes_are_one_line(script: ModuleType, tmp_path: Path) -> None:
    run = CliRunner().invoke
    assert run(script.main, ["qwen3-0.6b", "Q9", "x"]).exit_code == 2
    result = run(script.main, ["llama-1b", "F32", str(tmp_path / "none" / "x"), "--layers", "1"])
    assert result.exit_code == 1 and "cannot be written" in result.output
    result = run(script.main, ["-h"])
    assert "Examples:" in result.output and result.exit_code == 0
