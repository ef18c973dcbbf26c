"""Checkpoints as GGUF files: equal to the golden pairs, and by definition on small ones."""

from __future__ import annotations

import math
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import (
    HEADS,
    HIDDEN,
    bf16,
    change,
    dump,
    llama,
    llama_tensors,
    safetensors,
    sharded,
    widened,
)

import runtime
from runtime.conversion import metadata, pieces
from runtime.conversion.checkpoint import Checkpoint, Stored
from runtime.gguf.reader import GGUFFile, open_gguf
from runtime.gguf.source import Source
from runtime.ops.dtypes import MXFP4, Q8_0
from runtime.ops.quants import dequantize

MODELS = ("llama", "qwen2", "qwen3", "qwen3moe", "gptoss", "qwen3next", "qwen35", "qwen35moe")


def plain(value: Any) -> Any:
    """A metadata value to compare, its type with it."""
    return (str(value.dtype), value.tolist()) if isinstance(value, np.ndarray) else value


def assert_same(found: GGUFFile, wanted: GGUFFile) -> None:
    """The same keys and tensors, in the same order."""
    assert [*found.metadata] == [*wanted.metadata]
    for key, value in wanted.metadata.items():
        mine = found.metadata[key]
        assert type(mine) is type(value), key
        same = [*mine] == [*value] if hasattr(value, "raw") else plain(mine) == plain(value)
        assert same, key
    assert [*found.tensors] == [*wanted.tensors]
    for name, tensor in wanted.tensors.items():
        mine = found.tensors[name]
        assert (mine.shape, mine.dtype) == (tensor.shape, tensor.dtype), name
        if name.endswith("ssm_a"):  # torch's exponential is not the same on all machines
            np.testing.assert_array_max_ulp(mine.array(), tensor.array(), 1)
        else:
            assert mine.data.tobytes() == tensor.data.tobytes(), name


@pytest.mark.parametrize("outtype", ["f32", "f16"])
@pytest.mark.parametrize("model", MODELS)
def test_golden_checkpoints(golden: Path, tmp_path: Path, model: str, outtype: str) -> None:
    out = runtime.convert(golden / model / "hf", tmp_path / "m.gguf", outtype)
    assert_same(open_gguf(out), open_gguf(golden / model / f"model-{outtype}.gguf"))


def test_text_part_of_a_model_that_sees(golden: Path, tmp_path: Path) -> None:
    out = runtime.convert(golden / "qwen35-vl" / "hf", tmp_path / "m.gguf", "f16")
    assert_same(open_gguf(out), open_gguf(golden / "qwen35" / "model-f16.gguf"))


def test_what_was_converted_runs(tmp_path: Path) -> None:
    """The logits are those of the definition: rotation of halves, as in the checkpoint."""
    out = runtime.convert(llama(tmp_path / "hf"), tmp_path / "m.gguf")
    model = runtime.load(out)
    assert np.isfinite(model.eval([1, 2, 3])).all()
    q = widened(llama_tensors()["model.layers.1.self_attn.q_proj.weight"])
    found = open_gguf(out).tensors["blk.1.attn_q.weight"].to_float32()
    heads = q.reshape(HEADS, 2, -1, HIDDEN)
    np.testing.assert_array_equal(found.reshape(HEADS, -1, 2, HIDDEN)[:, :, 0], heads[:, 0])
    np.testing.assert_array_equal(found.reshape(HEADS, -1, 2, HIDDEN)[:, :, 1], heads[:, 1])


@pytest.mark.parametrize(
    ("outtype", "kind", "code"),
    [("auto", "bf16", 32), ("f32", "f32", 0), ("f16", "f16", 1), ("q8_0", "q8_0", 7)],
)
def test_types(tmp_path: Path, outtype: str, kind: str, code: int) -> None:
    file = open_gguf(runtime.convert(llama(tmp_path / "hf"), tmp_path / "m.gguf", outtype))
    assert file.metadata["general.file_type"] == code
    assert file.tensors["blk.0.ffn_up.weight"].dtype.name == kind
    assert file.tensors["blk.0.ffn_norm.weight"].dtype.name == "f32"
    wanted = widened(llama_tensors()["model.layers.0.mlp.up_proj.weight"])
    near = 0.01 if kind == "q8_0" else 1e-3
    found = file.tensors["blk.0.ffn_up.weight"].to_float32()
    np.testing.assert_allclose(found, wanted, atol=near * np.abs(wanted).max())
    if kind in ("bf16", "f32"):
        np.testing.assert_array_equal(found, wanted)


def test_rows_that_blocks_do_not_fit(tmp_path: Path) -> None:
    tensors = llama_tensors()
    for i in range(2):
        for name in ("gate_proj", "up_proj", "down_proj"):
            key = f"model.layers.{i}.mlp.{name}.weight"
            stored = tensors[key][1]
            short = stored[:, :90] if name == "down_proj" else stored[:90]
            tensors[key] = "BF16", np.ascontiguousarray(short)
    folder = llama(tmp_path / "hf", tensors)
    change(folder / "config.json", intermediate_size=90)
    file = open_gguf(runtime.convert(folder, tmp_path / "m.gguf", "q8_0"))
    kinds = {n.split(".")[-2]: t.dtype.name for n, t in file.tensors.items()}
    assert (kinds["ffn_down"], kinds["ffn_up"]) == ("f16", "q8_0")


def test_parts_are_one_model(tmp_path: Path) -> None:
    tensors = llama_tensors()
    whole = runtime.convert(llama(tmp_path / "hf"), tmp_path / "whole.gguf")
    names = sorted(tensors)
    folder = (
        llama(tmp_path / "parts" / "hf", tensors) if (tmp_path / "parts").mkdir() is None else 0
    )
    (folder / "model.safetensors").unlink()
    sharded(folder, [{n: tensors[n] for n in names[:7]}, {n: tensors[n] for n in names[7:]}])
    parts = runtime.convert(folder, tmp_path / "parts.gguf")
    assert parts.read_bytes() == whole.read_bytes()


def test_settings_that_have_a_key_only_where_they_are_unusual(golden: Path, tmp_path: Path) -> None:
    cases = (
        ("qwen3moe", {"norm_topk_prob": False}, "qwen3moe.expert_weights_norm", False),
        ("gptoss", {"layer_types": ["full_attention", "sliding_attention"]},
         "gpt-oss.attention.sliding_window_pattern", [False, True]),
    )  # fmt: skip
    for model, setting, key, value in cases:
        source = tmp_path / model
        shutil.copytree(golden / model / "hf", source, copy_function=shutil.copyfile)
        change(source / "config.json", **setting)
        found = open_gguf(runtime.convert(source, tmp_path / "m.gguf")).metadata
        np.testing.assert_array_equal(found[key], value)


def test_blocks_that_look_ahead(golden: Path, tmp_path: Path) -> None:
    source = tmp_path / "hf"
    shutil.copytree(golden / "qwen35" / "hf", source, copy_function=shutil.copyfile)
    checkpoint = Checkpoint(source)
    tensors = {n: read(t) for n, t in checkpoint.tensors.items()}
    rng = np.random.default_rng(0)
    more = {
        n.replace("model.layers.3.", "mtp.layers.0."): t
        for n, t in tensors.items()
        if n.startswith("model.layers.3.")
    }
    more |= {f"mtp.{n}.weight": bf16(rng.normal(0, 1, 128)) for n in ("norm", "pre_fc_norm_hidden")}
    more["mtp.pre_fc_norm_embedding.weight"] = bf16(np.ones(128))
    more["mtp.fc.weight"] = bf16(rng.normal(0, 1, (128, 256)))
    safetensors(source / "model.safetensors", tensors | more)
    file = open_gguf(runtime.convert(source, tmp_path / "m.gguf"))
    assert file.metadata["qwen35.block_count"] == 5
    assert file.metadata["qwen35.nextn_predict_layers"] == 1
    assert file.metadata["qwen35.attention.recurrent_layers"].tolist() == [1, 1, 1, 0, 0]
    ahead = {n.removeprefix("blk.4.nextn."): t for n, t in file.tensors.items() if ".nextn." in n}
    assert {*ahead} == {f"{n}.weight" for n in ("eh_proj", "enorm", "hnorm", "shared_head_norm")}
    np.testing.assert_array_equal(ahead["enorm.weight"].to_float32(), 2)  # stored less one
    without = open_gguf(runtime.convert(source, tmp_path / "n.gguf", mtp=False))
    assert not any(n.startswith("blk.4") for n in without.tensors)
    assert "qwen35.nextn_predict_layers" not in without.metadata


def read(tensor: Stored) -> tuple[str, np.ndarray]:
    """A stored tensor as it is."""
    rows = np.arange(pieces.rows_of(tensor))
    return tensor.kind, tensor.take(rows).reshape(tensor.shape)


def stored(tmp_path: Path, name: str, kind: str, array: np.ndarray) -> Stored:
    path = safetensors(tmp_path / f"{name}.safetensors", {name: (kind, array)})
    source = Source(path)
    return Stored(name, kind, array.shape, source, source.size - array.nbytes)


def test_mxfp4_codes_in_pairs(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 16, (5, 2, 32), np.uint8)
    scales = rng.integers(118, 130, (5, 2), np.uint8)
    pairs = codes[..., 0::2] | codes[..., 1::2] << 4
    matrix = pieces.Mxfp4(stored(tmp_path, "c", "U8", pairs), stored(tmp_path, "s", "U8", scales))
    found = dequantize(matrix.take(np.array([4, 0, 2])), MXFP4, (3, 64))
    steps = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    values = np.where(codes < 8, 1, -1) * steps[codes & 7] * 2.0 ** (scales[..., None] - 127.0)
    np.testing.assert_array_equal(found, values.reshape(5, 64)[[4, 0, 2]])


def test_8_bit_floats_with_scales_of_blocks(tmp_path: Path) -> None:
    codes = np.array([[0x38, 0xB8, 0x40], [0x01, 0x7E, 0x00], [0x08, 0x30, 0xC4]], np.uint8)
    scales = np.array([[2, 10], [0.5, 1]], np.float32)
    matrix = pieces.Scaled(
        stored(tmp_path, "c", "F8_E4M3", codes), stored(tmp_path, "s", "F32", scales), (2, 2)
    )
    values = np.array([[1, -1, 2], [2**-9, 448, 0], [2**-6, 0.5, -3]], np.float32)
    wide = np.array([[2, 2, 10], [2, 2, 10], [0.5, 0.5, 1]], np.float32)
    np.testing.assert_array_equal(matrix.take(np.arange(3)), values * wide)


def test_rows_far_apart_and_in_any_order(tmp_path: Path) -> None:
    array = np.arange(600, dtype="<f4").reshape(200, 3)
    matrix = stored(tmp_path, "x", "F32", array)
    for order in ([0, 199, 7, 8, 9], [5, 4, 3], [], range(200), range(0, 200, 2)):
        index = np.asarray([*order], np.int64)
        np.testing.assert_array_equal(matrix.take(index), array[index])


@pytest.mark.parametrize(
    ("model", "name"),
    [("qwen35", "linear_attn.in_proj_qkv"), ("qwen35", "linear_attn.conv1d"),
     ("qwen3next", "linear_attn.in_proj_qkvz"), ("qwen35", "linear_attn.A_log"),
     ("gptoss", "mlp.experts.gate_up_proj")],
)  # fmt: skip
def test_no_row_is_left_out(golden: Path, tmp_path: Path, model: str, name: str) -> None:
    source = tmp_path / "hf"
    shutil.copytree(golden / model / "hf", source)
    found = Checkpoint(source).tensors
    arrays = {}
    for key, t in found.items():
        array = t.take(np.arange(math.prod(t.shape) // t.width)).reshape(t.shape)
        arrays[key] = (t.kind, np.concatenate([array, array[:1]]) if name in key else array)
    for path in source.glob("*.safetensors*"):
        path.unlink()
    safetensors(source / "model.safetensors", arrays)
    with pytest.raises(runtime.ModelError, match=rf"{name}.*' ?(: |has )shape .*config.json"):
        runtime.convert(source, tmp_path / "m.gguf")


def test_brain_floats_round_to_even() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800001, 0x80000001])
    found = pieces._brain(bits.astype(np.uint32).view(np.float32))
    assert [hex(n) for n in found] == ["0x3f80", "0x3f82", "0x3f81", "0x7f80", "0x7fc0", "0x8000"]


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path) -> None:
    tensors = llama_tensors()
    rows = 300_000
    big = np.broadcast_to(np.uint16(0x3C00), (rows, HIDDEN))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] = "BF16", big
    folder = llama(tmp_path / "hf", tensors)
    change(folder / "config.json", vocab_size=rows)
    checkpoint = Checkpoint(folder)
    plan = pieces.Planned(
        "output.weight", (rows, HIDDEN),
        [pieces.Rows(checkpoint.tensors["lm_head.weight"], range(rows))],
    )  # fmt: skip
    tracemalloc.start()
    try:
        total = sum(len(c) for c in plan.chunks(runtime.ops.dtypes.F32, lambda rows, kind: rows))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == rows
    assert peak < 50 << 20 < big.nbytes + 4 * big.size  # of 36 MiB read and 73 MiB written


def test_progress_and_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = llama(tmp_path / "hf"), tmp_path / "m.gguf"
    calls: list[tuple[int, int]] = []
    runtime.convert(folder, out, progress=lambda done, total, what: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] == open_gguf(out).tensors_nbytes
    out.unlink()
    monkeypatch.setattr(pieces.Rows, "pieces", lambda self: iter(()))
    with pytest.raises(runtime.FileError, match=r"0 given"):
        runtime.convert(folder, out)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_sampling_and_size(tmp_path: Path) -> None:
    folder = llama(tmp_path / "my-model-v2")
    dump(folder / "generation_config.json", {
        "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05, "eos_token_id": [1, 2],
        "top_p": None,
    })  # fmt: skip
    found = open_gguf(runtime.convert(folder, tmp_path / "m.gguf")).metadata
    assert found["general.sampling.temp"] == pytest.approx(0.6)
    assert found["general.sampling.top_k"] == 20
    assert found["general.sampling.penalty_repeat"] == pytest.approx(1.05)
    assert "general.sampling.top_p" not in found
    assert (found["general.name"], found["general.size_label"]) == ("My Model v2", "99K")


@pytest.mark.parametrize(
    ("count", "label"),
    [(1_543_714_304, "1.5B"), (8_030_261_248, "8.0B"), (70_553_706_496, "71B"), (400, "0.40K")],
)
def test_size_labels(count: int, label: str) -> None:
    assert metadata.size_label([pieces.Planned("x.weight", (count,), [])]) == label


def test_windows_limit_the_context(tmp_path: Path) -> None:
    folder = llama(tmp_path / "hf")
    change(folder / "config.json", architectures=["MistralForCausalLM"], sliding_window=64)
    with pytest.warns(UserWarning, match=r"config.json: sliding_window = 64"):
        out = runtime.convert(folder, tmp_path / "m.gguf")
    assert open_gguf(out).metadata["llama.context_length"] == 64
    change(folder / "config.json", sliding_window=None)
    assert open_gguf(runtime.convert(folder, out)).metadata["llama.context_length"] == 256


def test_q8_0_is_that_of_the_quantiser(tmp_path: Path) -> None:
    from runtime.backends.cpu.quantising import quantise

    file = open_gguf(runtime.convert(llama(tmp_path / "hf"), tmp_path / "m.gguf", "q8_0"))
    values = widened(llama_tensors()["model.layers.0.mlp.up_proj.weight"])
    wanted = quantise(np.ascontiguousarray(values), Q8_0)
    assert file.tensors["blk.0.ffn_up.weight"].data.tobytes() == wanted.tobytes()
