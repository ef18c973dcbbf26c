"""What different converters call and leave out: each dialect gives the logits of the plain file.

A dialect changes metadata and tensors of a small model without changing the model; every one runs
on the CPU backend and is held against the reference backend on the file that it was made from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_files import ARRAY, Typed, gguf_bytes
from small_models import NOVEL, Sizes, metadata, tensors

import runtime

IDS = [1, 5, 9, 3, 40, 7, 22, 61, 13, 2, 8, 30]
MXFP4, PAIRED_MXFP4 = 39, 4
LLAMA, QWEN3, MOE = Sizes("llama"), Sizes("qwen3"), Sizes("qwen3moe", experts=6, inner=32)
HYBRID, OSS = NOVEL["qwen35"], NOVEL["gpt-oss"]


@dataclass
class File:
    """A model to be written: keys without the architecture's prefix, float32 arrays by name or
    (type id, shape, stored bytes)."""

    architecture: str
    keys: dict[str, Any]
    tensors: dict[str, Any]
    general: dict[str, Any] = field(default_factory=lambda: {"tokenizer.ggml.model": "none"})

    @staticmethod
    def of(size: Sizes) -> File:
        return File(size.architecture, metadata(size), tensors(size))

    def write(self, path: Path) -> Path:
        head = {"general.architecture": self.architecture, **self.general}
        head |= {f"{self.architecture}.{key}": value for key, value in self.keys.items()}
        rows = {
            name: t if isinstance(t, tuple) else ((*t.shape,), 0, t.astype("<f4"))
            for name, t in self.tensors.items()
        }
        path.write_bytes(gguf_bytes(head, rows))
        return path

    def rename(self, old: str, new: str) -> None:
        """In every name, `old` becomes `new`."""
        self.tensors = {name.replace(old, new): t for name, t in self.tensors.items()}


def imatrix(file: File) -> None:
    """bartowski, unsloth, mradermacher: notes on quantisation, templates, padding."""
    file.general |= {
        "general.quantized_by": "Unsloth", "general.size_label": "0.6B", "general.file_type": 15,
        "general.base_model.0.repo_url": "https://huggingface.co/Qwen/Qwen3-0.6B",
        "general.tags": ["chat"], "quantize.imatrix.file": "imatrix.dat",
        "quantize.imatrix.entries_count": 196, "mradermacher.quantized_on": "host",
        "tokenizer.ggml.padding_token_id": 3, "tokenizer.chat_template": "{{ messages }}",
        "tokenizer.chat_template.tool_use": "{{ tools }}", "tokenizer.ggml.add_bos_token": False,
        "general.sampling.temp": 0.6,
    }  # fmt: skip


def early(file: File) -> None:
    """llama.cpp of 2023: legacy keys and tensors, counts of experts that are not there."""
    file.keys |= {
        "rope.scale_linear": 1.0, "tensor_data_layout": "Meta AI original pth", "vocab_size": 80,
        "expert_count": 0, "expert_used_count": 0, "rope.dimension_count": LLAMA.dim,
    }  # fmt: skip
    for layer in range(LLAMA.layers):
        file.tensors[f"blk.{layer}.attn_rot_embd"] = np.ones(16, np.float32)


def by_hand(file: File) -> None:
    """gguf-py by hand: one value for each layer, types of other widths, f16 norms and biases."""
    n = LLAMA.layers
    file.keys["attention.head_count"] = Typed(ARRAY, [LLAMA.heads] * n, element=2)
    file.keys["attention.head_count_kv"] = Typed(ARRAY, [LLAMA.kv_heads] * n, element=11)
    file.keys["feed_forward_length"] = Typed(ARRAY, [LLAMA.inner] * n, element=5)
    file.keys["block_count"] = Typed(10, n)
    file.keys["rope.freq_base"] = Typed(12, 10000.0)
    file.keys["attention.layer_norm_rms_epsilon"] = Typed(12, 1e-6)


def mlx(file: File) -> None:
    """mlx_lm.convert's GGUF: no head sizes, no base, the layout note of Meta's files."""
    del file.keys["rope.freq_base"]
    file.keys |= {"tensor_data_layout": "Meta AI original pth", "rope.scaling.finetuned": False}
    file.general["general.quantization_version"] = 2


def nvfp4(file: File) -> None:
    """ModelOpt and compressed-tensors: a scale beside each matrix, calibration of its input."""
    for number, (name, values) in enumerate(list(file.tensors.items())):
        part = name.removesuffix(".weight")
        if values.ndim < 2 or part in ("token_embd", name) or "conv1d" in part:
            continue
        factor = np.float32(2.0 ** (number % 5 - 2))
        count = len(values) if values.ndim == 3 else 1
        factors = factor * np.float32(2.0) ** np.arange(count, dtype=np.float32)
        file.tensors[name] = values / factors.reshape(-1, *[1] * (values.ndim - 1))
        file.tensors[f"{part}.scale"] = factors
        file.tensors[f"{part}.input_scale"] = np.full(count, 0.25, np.float32)


def one_scale_for_all_experts(file: File) -> None:
    """Stacks of experts with one factor for all of them."""
    for name, values in list(file.tensors.items()):
        if values.ndim == 3:
            file.tensors[name] = values / np.float32(4)
            file.tensors[f"{name.removesuffix('.weight')}.scale"] = np.full(1, 4, np.float32)


def fused(file: File) -> None:
    """Queries, keys and values in one tensor, their biases with them."""
    for layer in range(file.keys["block_count"]):
        at = f"blk.{layer}.attn_"
        for kind in ("weight", "bias"):
            names = [f"{at}{part}.{kind}" for part in "qkv"]
            if all(name in file.tensors for name in names):
                parts = [file.tensors.pop(name) for name in names]
                file.tensors[f"{at}qkv.{kind}"] = np.concatenate(parts)


def fused_matrices(file: File) -> None:
    """The same, but the biases stay apart."""
    kept = {name: t for name, t in file.tensors.items() if name.endswith("bias")}
    file.tensors = {name: t for name, t in file.tensors.items() if name not in kept}
    fused(file)
    file.tensors |= kept


def fused_experts(file: File) -> None:
    """gate and up of all experts in one tensor, one after the other."""
    for layer in range(file.keys["block_count"]):
        at = f"blk.{layer}.ffn_"
        halves = [file.tensors.pop(f"{at}{part}_exps.weight") for part in ("gate", "up")]
        file.tensors[f"{at}gate_up_exps.weight"] = np.concatenate(halves, axis=1)


def without_expert_length(file: File) -> None:
    """Qwen3-MoE of converters that give feed_forward_length alone."""
    del file.keys["expert_feed_forward_length"]
    file.keys["feed_forward_length"] = MOE.inner * MOE.used


def ollama_llama(file: File) -> None:
    """Ollama's Llama: the head size under two names, an epsilon of norms that are not there."""
    file.keys |= {"attention.head_dim": LLAMA.dim, "attention.layer_norm_epsilon": 1e-5}
    del file.keys["attention.key_length"], file.keys["attention.value_length"]


def ollama_moe(file: File) -> None:
    """Ollama's Qwen3-MoE: its own key for normalised weights."""
    without_expert_length(file)
    file.keys["norm_top_k_prob"] = True


def ollama_hybrid(file: File) -> None:
    """Ollama's Qwen3.5: no heads on recurrent layers, three sections, eyes and MTP inside."""
    n, vision = HYBRID.layers, {"block_count": 2, "image_mean": [0.5, 0.5, 0.5]}
    file.keys["attention.head_count_kv"] = [
        0 if HYBRID.recurrent(i) else HYBRID.kv_heads for i in range(n)
    ]
    sections = file.keys.pop("rope.dimension_sections")[:3]
    file.keys |= {
        "mrope_sections": sections, "rope.mrope_section": sections, "rope.mrope_interleaved": True,
        "ssm.v_head_reordered": True, "image_token_id": 70, "vision_start_token_id": 71,
        **{f"vision.{key}": value for key, value in vision.items()},
    }  # fmt: skip
    file.rename("ssm_dt.bias", "ssm_dt")
    for name in ("v.blk.0.attn_q.weight", "mm.0.weight", "mtp.layers.0.attn_q.weight"):
        file.tensors[name] = np.ones((8, 8), np.float32)
    del file.keys["full_attention_interval"]


def listed_layers(file: File) -> None:
    """Current llama.cpp: the interval by default, and a list that says otherwise."""
    file.keys["full_attention_interval"] = 4
    file.keys["attention.recurrent_layers"] = [HYBRID.recurrent(i) for i in range(HYBRID.layers)]


def ahead(file: File) -> None:
    """Blocks that predict further tokens, behind the layers."""
    n = file.keys["block_count"]
    file.keys |= {"block_count": n + 1, "nextn_predict_layers": 1}
    blocks = {name: t for name, t in file.tensors.items() if name.startswith("blk.0.")}
    file.tensors |= {name.replace("blk.0", f"blk.{n}"): t for name, t in blocks.items()}
    file.tensors[f"blk.{n}.nextn.eh_proj.weight"] = np.ones((64, 128), np.float32)


def experts_in_mxfp4(file: File) -> None:
    """gpt-oss as everyone has it."""
    for name, values in file.tensors.items():
        if "_exps.weight" in name:
            raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType.MXFP4)
            file.tensors[name] = (values.shape, MXFP4, raw)


def ollama_oss(file: File) -> None:
    """Ollama's gpt-oss: its names, rows of gate and up in turn, its first number of MXFP4."""
    file.architecture = "gptoss"
    for key in ("rope.scaling.type", "expert_feed_forward_length"):
        del file.keys[key]
    for layer in range(OSS.layers):
        at = f"blk.{layer}.ffn_"
        for kind in ("weight", "bias"):
            halves = [file.tensors.pop(f"{at}{part}_exps.{kind}") for part in ("gate", "up")]
            both = np.stack([h[2] if isinstance(h, tuple) else h for h in halves], axis=2)
            if kind == "weight":
                (experts, rows, inner), width = halves[0][0], halves[0][2].shape[-1]
                both = both.reshape(experts, 2 * rows, width)
                file.tensors[f"{at}gate_up_exps.weight"] = ((experts, 2 * rows, inner), MXFP4, both)
            else:
                file.tensors[f"{at}gate_up_exps.bias"] = both.reshape(len(both), -1)
    for old, new in (
        ("attn_output", "attn_out"), ("attn_sinks.weight", "attn_sinks"),
        ("post_attention_norm", "ffn_norm"),
    ):  # fmt: skip
        file.rename(old, new)
    for name, tensor in file.tensors.items():
        if isinstance(tensor, tuple):
            shape, _, raw = tensor
            file.tensors[name] = (shape, PAIRED_MXFP4, neighbours_in_bytes(raw))


def neighbours_in_bytes(raw: np.ndarray) -> np.ndarray:
    """MXFP4 blocks with elements 2i and 2i + 1 in byte i, as Hugging Face stores them."""
    blocks = raw.reshape(-1, 17).copy()
    codes = np.concatenate([blocks[:, 1:] & 15, blocks[:, 1:] >> 4], axis=1)  # 0 to 31
    blocks[:, 1:] = codes[:, ::2] | codes[:, 1::2] << 4
    return blocks


def linear(file: File) -> None:
    """Stretched by a factor, as says the file."""
    file.keys["rope.scaling.type"] = "linear"


def without_type(file: File) -> None:
    """A factor whose kind is not said: linear, of every architecture but Ollama's gptoss."""
    del file.keys["rope.scaling.type"]


def same(file: File) -> None:
    """As it is."""


Change = Callable[[File], None]
# name -> the model, what its plain file is made by, what the dialect does on top
DIALECTS: dict[str, tuple[Sizes, Change, Change]] = {
    "bartowski, unsloth, mradermacher": (QWEN3, same, imatrix),
    "llama.cpp of 2023": (LLAMA, same, early),
    "gguf-py by hand": (LLAMA, same, by_hand),
    "mlx": (LLAMA, same, mlx),
    "nvfp4 dense": (QWEN3, same, nvfp4),
    "nvfp4 experts": (MOE, same, nvfp4),
    "one scale for all experts": (MOE, same, one_scale_for_all_experts),
    "one scale for all experts, biases": (OSS, same, one_scale_for_all_experts),
    "nvfp4 biases": (OSS, same, nvfp4),
    "nvfp4 hybrid": (HYBRID, same, nvfp4),
    "nvfp4 qwen3next": (NOVEL["qwen3next-fused"], same, nvfp4),
    "fused qkv": (QWEN3, same, fused),
    "fused qkv with biases": (OSS, same, fused),
    "fused qkv, biases apart": (OSS, same, fused_matrices),
    "fused qkv with scales": (QWEN3, fused, nvfp4),
    "fused experts": (MOE, same, fused_experts),
    "fused experts with scales": (MOE, fused_experts, nvfp4),
    "no length of experts": (MOE, same, without_expert_length),
    "ollama llama": (LLAMA, same, ollama_llama),
    "ollama qwen3moe": (MOE, same, ollama_moe),
    "ollama qwen35": (HYBRID, same, ollama_hybrid),
    "gpt-oss with a factor alone": (OSS, linear, without_type),
    "ollama gptoss": (OSS, experts_in_mxfp4, ollama_oss),
    "layers listed": (HYBRID, same, listed_layers),
    "blocks ahead, dense": (LLAMA, same, ahead),
    "blocks ahead, hybrid": (HYBRID, same, ahead),
}


def logits(path: Path, **options: Any) -> np.ndarray:
    with runtime.load(path, kv_type="f32", **options) as model:
        return model.eval(IDS)


def nmse(got: np.ndarray, want: np.ndarray) -> float:
    return float(((got - want) ** 2).sum() / (want**2).sum())


@pytest.mark.parametrize("name", DIALECTS)
def test_a_dialect_is_the_same_model(tmp_path: Path, name: str) -> None:
    size, plainly, change = DIALECTS[name]
    plain, file = File.of(size), File.of(size)
    plainly(plain)
    plainly(file)
    change(file)
    want = logits(plain.write(tmp_path / "plain.gguf"), devices="reference")
    path = file.write(tmp_path / "dialect.gguf")
    assert nmse(logits(path, activations="f32"), want) < 1e-11
    assert nmse(logits(path, activations="int8"), want) < 3e-3


@pytest.mark.parametrize("size", [QWEN3, MOE, OSS, HYBRID], ids=lambda size: size.architecture)
def test_scales_change_the_model(tmp_path: Path, size: Sizes) -> None:
    """What the dialects above would miss: factors that nothing reads."""
    file, other = File.of(size), File.of(size)
    nvfp4(file)
    other.tensors = {n: t for n, t in file.tensors.items() if not n.endswith(".scale")}
    a, b = (logits(f.write(tmp_path / "m.gguf"), devices="reference") for f in (file, other))
    assert nmse(a, b) > 1e-2


def test_a_scale_of_another_shape_is_refused(tmp_path: Path) -> None:
    """One factor for each row, as other number formats have them, is no scale of a tensor."""
    file = File.of(QWEN3)
    file.tensors["blk.0.attn_k.scale"] = np.ones(64, np.float32)
    with pytest.raises(runtime.Error, match=r"'blk\.0\.attn_k\.scale' has shape \[64\]"):
        runtime.load(file.write(tmp_path / "m.gguf"), devices="null")
