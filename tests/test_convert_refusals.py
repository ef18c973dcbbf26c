"""Checkpoints that are not converted, or not without a wrong result: one line that says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import (
    LAYERS,
    bf16,
    change,
    dump,
    llama,
    llama_tensors,
    safetensors,
    sharded,
    tokenizer,
)
from click.testing import CliRunner

import runtime
from runtime.cli import convert, main
from runtime.conversion import plan

UP = "model.layers.1.mlp.up_proj.weight"


def settings(**values: Any) -> Callable[[Path], object]:
    """Settings of config.json, of a checkpoint that has them."""
    return lambda folder: change(folder / "config.json", **values)


def tensors(**changed: Any) -> Callable[[Path], object]:
    """Other tensors; None for none."""
    given = {name.replace("__", "."): value for name, value in changed.items()}
    merged = llama_tensors() | given
    left = {name: value for name, value in merged.items() if value is not None}
    return lambda folder: safetensors(folder / "model.safetensors", left)


def without(*names: str) -> Callable[[Path], object]:
    """Files of the folder that are not there."""
    return lambda folder: [(folder / name).unlink() for name in names]


def _cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _part_missing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    given = llama_tensors()
    sharded(folder, [{UP: given.pop(UP)}, given])
    (folder / "model-00001-of-00002.safetensors").unlink()


def _tensor_missing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    sharded(folder, [llama_tensors()])
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    change(index, weight_map=names | {"extra.weight": "model-00001-of-00001.safetensors"})


def _pre_tokenizer(folder: Path) -> None:
    steps = {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Isolated", "invert": False}
    change(folder / "tokenizer.json", pre_tokenizer=steps)


def pointer(name: str) -> Callable[[Path], object]:
    """A file that was cloned without git-LFS."""
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 988097824\n"
    return lambda folder: (folder / name).write_text(text)


def with_suffix() -> dict[str, Any]:
    """A tokenizer.json that marks ends of words."""
    spec = tokenizer()
    return spec | {"model": spec["model"] | {"end_of_word_suffix": "</w>"}}


POINTER = r"this is a git-LFS pointer, not the file: fetch what it stands for with `git lfs pull`"
ROPE = {"rope_theta": 10000.0}
REFUSED = {
    "architecture": (settings(architectures=["GemmaForCausalLM"]),
                     r"config.json: architecture 'GemmaForCausalLM' .*LlamaForCausalLM.*Qwen3"),
    "no architecture": (settings(architectures=None), r"architecture none .*there are "),
    "rope kind": (settings(rope_scaling={"type": "dynamic", "factor": 2.0}),
                  r"config.json: rope scaling 'dynamic' .*yarn"),
    "rope setting": (settings(rope_parameters={**ROPE, "rope_type": "yarn", "mscale": 0.7}),
                     r"config.json: rope setting mscale = 0.7"),
    "yarn's length": (settings(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
                      r"original_max_position_embeddings is missing"),
    "yarn's ramp": (settings(rope_scaling={
        "rope_type": "yarn", "factor": 4.0, "truncate": False,
        "original_max_position_embeddings": 64}), r"truncate = False"),
    "llama3 elsewhere": (settings(architectures=["Qwen2ForCausalLM"], rope_scaling={
        "rope_type": "llama3"}), r"'llama3' is not implemented for qwen2"),
    "activation": (settings(hidden_act="gelu"), r"config.json: hidden_act = 'gelu'"),
    "capping": (settings(final_logit_softcapping=30.0), r"final_logit_softcapping = 30.0"),
    "partial": (settings(partial_rotary_factor=0.5), r"partial_rotary_factor = 0.5"),
    "layer types": (settings(layer_types=["full_attention"]),
                    r"layer_types = .* is not a list of 2"),
    "number": (settings(rms_norm_eps="small"), r"rms_norm_eps = 'small' is no number"),
    "huge": (settings(vocab_size=10**30), r"config.json: vocab_size = 1000"),
    "rope number": (settings(rope_scaling={"rope_type": "linear", "factor": "2"}),
                    r"rope setting factor = '2' cannot be used"),
    "sampling": (lambda f: dump(f / "generation_config.json", {"top_k": "few"}),
                 r"generation_config.json: top_k = 'few'"),
    "half a character": (lambda f: (f / "tokenizer_config.json").write_text('{"a": "\\ud800"}'),
                         r"tokenizer_config.json: no valid JSON"),
    "added tokens": (lambda f: change(f / "tokenizer_config.json", added_tokens_decoder={"x": 1}),
                     r"hf: the added token 1 has no usable id"),
    "suffix": (lambda f: dump(f / "tokenizer.json", with_suffix()),
               r"tokenizer.json: end_of_word_suffix = '</w>'"),
    "tokenizer": (lambda f: change(f / "tokenizer.json", added_tokens=[1]),
                  r"tokenizer.json: cannot be used"),
    "size": (settings(vocab_size="many"), r"config.json: vocab_size = 'many'"),
    "method": (settings(quantization_config=[1]), r"quantization_config = \[1\] is not an object"),
    "gptq": (settings(quantization_config={"quant_method": "gptq"}), r"quantised with 'gptq'"),
    "fp8": (tensors(**{UP: ("F8_E4M3", np.zeros((96, 64), np.uint8))}),
            rf"model.safetensors: tensor '{UP}' is of type F8_E4M3"),
    "experts": (tensors(**{"model.layers.0.mlp.experts.0.up_proj.weight": bf16(np.ones((2, 2)))}),
                r"tensor 'model.layers.0.mlp.experts.0.up_proj.weight' is not known for llama"),
    "other tensor": (tensors(extra=bf16(np.ones(2))), r"tensor 'extra' is not known for llama"),
    "no output": (tensors(lm_head__weight=None), r"no tensor lm_head.weight"),
    "no matrix": (tensors(**{UP: None}), rf"hf: tensor '{UP}' is missing \(the checkpoint has '"),
    "no embeddings": (tensors(model__embed_tokens__weight=None),
                      r"hf: tensor 'model.embed_tokens.weight' is missing"),
    "shape": (tensors(**{UP: bf16(np.ones((5, 64)))}),
              rf"'{UP}' has shape \[5, 64\], but config.json asks for \[96, 64\]"),
    "no bias known": (tensors(model__norm__bias=bf16(np.ones(64))),
                      r"tensor 'model.norm.bias' of the checkpoint .* wrong$"),
    "no size": (settings(intermediate_size=None),
                r"hf: intermediate_size of config.json is missing$"),
    "layers": (settings(num_hidden_layers=3),
               r"hf: num_hidden_layers of config.json says 3 layers, but the checkpoint has tens"),
    "rows": (settings(vocab_size=289),
             r"config.json: vocab_size = 289, but tensor 'model.embed_tokens.weight' has 288 rows"),
    "layer kind": (settings(layer_types=["foo", "full_attention"]),
                   r"config.json: layer_types has 'foo', .*; there are full_.*, sliding_attention"),
    "kind elsewhere": (settings(layer_types=["linear_attention"] * 2), r"has 'linear_attention'"),
    "no window": (settings(layer_types=["sliding_attention"] * 2), r"sliding_window is missing"),
    "biases": (settings(attention_bias=True),
               r"config.json: attention_bias = True, but no tensor .*self_attn.q_proj.bias"),
    "qwen2's biases": (settings(architectures=["Qwen2ForCausalLM"]), r"self_attn.q_proj.bias"),
    "a layer's bias": (tensors(**{"model.layers.0.mlp.up_proj.bias": bf16(np.ones(96))}),
                       r"tensor 'model.layers.1.mlp.up_proj.bias' is missing, which other layers"),
    "pointer": (pointer("model.safetensors"), POINTER),
    "pointer to JSON": (pointer("tokenizer.json"), POINTER),
    "pointer to pieces": (pointer("tokenizer.model"), POINTER),
    "heads": (settings(num_attention_heads=5), r"q_proj.weight.*64 rows are not 5 heads"),
    "no config": (without("config.json"), r"hf: no config.json"),
    "no tokenizer": (without("tokenizer.json"), r"hf: no tokenizer.json"),
    "no tensors": (without("model.safetensors"), r"hf: no model.safetensors"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), r"config.json: no valid JSON"),
    "cut off": (_cut_off, r"model.safetensors: tensor .* ends behind the end"),
    "no safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99),
                       r"model.safetensors: not a safetensors file"),
    "part": (_part_missing, r"model-00001-of-00002.safetensors: this part is missing"),
    "tensor": (_tensor_missing, r"model-00001-of-00001.safetensors: tensor 'extra.weight' of"),
    "pre-tokenizer": (_pre_tokenizer, r"tokenizer.json: its pre_tokenizer cuts words in none"),
    "normalizer": (lambda f: change(f / "tokenizer.json", normalizer={"type": "Lowercase"}),
                   r"tokenizer.json: the converted model would read texts differently"),
    "kind": (lambda f: change(f / "tokenizer.json", model={"type": "Unigram", "vocab": []}),
             r"tokenizer.json: a model of type 'Unigram'"),
    "ids": (settings(vocab_size=258), r"token '<\|end\|>' has the id 258.*vocab_size is 258"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    spoil, message = REFUSED[case]
    folder = llama(tmp_path / "hf")
    spoil(folder)
    with pytest.raises(runtime.Error, match=message) as caught:
        runtime.convert(folder, tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_value_that_halves_do_not_hold(tmp_path: Path) -> None:
    big = bf16(np.full((96, 64), 1e6))
    folder = llama(tmp_path / "hf", llama_tensors() | {UP: big})
    with pytest.raises(runtime.FileError, match=rf"'{UP}' cannot be f16 .*65504.*bf16"):
        runtime.convert(folder, tmp_path / "m.gguf", "f16")
    runtime.convert(folder, tmp_path / "m.gguf", "bf16")
    assert LAYERS == 2


def test_wrong_arguments(tmp_path: Path) -> None:
    folder = llama(tmp_path / "hf")
    with pytest.raises(runtime.OptionError, match=r"'q4_0' is not known; there are auto, f32"):
        runtime.convert(folder, tmp_path / "m.gguf", "q4_0")
    for args, more, name in (
        ((None, "m"), {}, "folder"), ((3, "m"), {}, "folder"), ((folder, None), {}, "out"),
        ((folder, "m", None), {}, "outtype"), ((folder, "m"), {"mtp": "no"}, "mtp"),
        ((folder, "m"), {"progress": 3}, "progress"),
    ):  # fmt: skip
        with pytest.raises(runtime.OptionError, match=rf"^{name}=.* must be "):
            runtime.convert(*args, **more)
    assert runtime.convert(folder, tmp_path / "m.gguf", "F16").is_file()
    (tmp_path / "link").symlink_to(folder / "model.safetensors")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for path in (*before, tmp_path / "link"):
        with pytest.raises(runtime.FileError, match=r"this is a file that is read"):
            runtime.convert(folder, path)
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(runtime.FileError, match=r"this is a folder"):
        runtime.convert(folder, tmp_path)
    for missing in (tmp_path / "none", folder / "config.json"):
        with pytest.raises(runtime.FileError, match=r"config.json in it"):
            runtime.convert(missing, tmp_path / "m.gguf")
    with pytest.raises(runtime.FileError, match=r"cannot be written"):
        runtime.convert(folder, tmp_path / "none" / "m.gguf")


def test_the_command_knows_all_types() -> None:
    assert [*convert.OUTTYPES] == ["auto", *plan.OUTTYPES]


def test_an_interrupt_says_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("runtime.conversion.convert.write_gguf", interrupted)
    folder, out = llama(tmp_path / "hf"), tmp_path / "m.gguf"
    result = CliRunner().invoke(main, ["convert", str(folder), str(out)])
    assert result.exit_code == 130
    assert f"stopped: {out} was not written\n" in result.stderr


def test_command(tmp_path: Path) -> None:
    folder, out = llama(tmp_path / "hf"), tmp_path / "m.gguf"
    result = CliRunner().invoke(main, ["convert", str(folder), str(out), "--outtype", "f16"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{out}: llama, 99K, 21 tensors, ")
    dump(folder / "config.json", {})
    result = CliRunner().invoke(main, ["convert", str(folder), str(out)])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {folder / 'config.json'}: architecture none")
