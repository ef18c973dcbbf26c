"""Small Hugging Face checkpoints, their safetensors files encoded here byte by byte."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.text.bytepair import BYTE_LETTERS

HIDDEN, HEADS, KV_HEADS, UNITS, ROWS, LAYERS = 64, 4, 2, 96, 288, 2
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
Stored = tuple[str, np.ndarray]  # type in the header, numbers (BF16: their bits)


def bf16(values: np.ndarray) -> Stored:
    """Cut to brain floats."""
    return "BF16", (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype("<u2")


def widened(stored: Stored) -> np.ndarray:
    """The values as float32."""
    kind, array = stored
    if kind == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def safetensors(path: Path, tensors: Mapping[str, Stored]) -> Path:
    """A file of these tensors, in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (kind, array) in tensors.items():
        offsets = [at, at + array.nbytes]
        header[name] = {"dtype": kind, "shape": [*array.shape], "data_offsets": offsets}
        at += array.nbytes
    text = json.dumps(header).encode()
    data = b"".join(array.tobytes() for _, array in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def sharded(folder: Path, parts: Sequence[Mapping[str, Stored]]) -> None:
    """Several files, and the index of them."""
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        safetensors(folder / name, part)
    files = {tensor: n for n, part in zip(names, parts, strict=True) for tensor in part}
    dump(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})


def dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def change(path: Path, **values: Any) -> None:
    """Set keys of the object in a JSON file."""
    dump(path, json.loads(path.read_text()) | values)


def tokenizer(pattern: str = LLAMA3, **more: Any) -> dict[str, Any]:
    """A tokenizer.json of all bytes, two merges and two added tokens."""
    texts = [*BYTE_LETTERS, "th", "the"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": 258, "content": "<|end|>", "special": True, **plain},
        {"id": 259, "content": "<tool>", "special": False, **plain},
    ]
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    letters = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    return {
        "version": "1.0", "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, letters]},
        "post_processor": None, "decoder": letters,
        "model": {
            "type": "BPE", "vocab": {text: i for i, text in enumerate(texts)},
            "merges": [["t", "h"], ["th", "e"]], "byte_fallback": False,
        },
    } | more  # fmt: skip


def llama_tensors() -> dict[str, Stored]:
    """The weights of a small Llama."""
    rng = np.random.default_rng(7)
    inner = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
        "self_attn.v_proj": (HIDDEN // 2, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (UNITS, HIDDEN), "mlp.up_proj": (UNITS, HIDDEN),
        "mlp.down_proj": (HIDDEN, UNITS), "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    shapes = {"lm_head": (ROWS, HIDDEN), "model.embed_tokens": (ROWS, HIDDEN)}
    shapes |= {f"model.layers.{i}.{name}": s for i in range(LAYERS) for name, s in inner.items()}
    shapes |= {"model.norm": (HIDDEN,)}
    return {f"{n}.weight": bf16(rng.normal(0, 0.1, s)) for n, s in sorted(shapes.items())}


def llama(folder: Path, tensors: Mapping[str, Stored] | None = None) -> Path:
    """A whole checkpoint of a small Llama."""
    folder.mkdir()
    safetensors(folder / "model.safetensors", llama_tensors() if tensors is None else tensors)
    dump(folder / "tokenizer.json", tokenizer())
    dump(folder / "tokenizer_config.json", {"eos_token": "<|end|>", "add_bos_token": False})
    dump(folder / "config.json", {
        "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "vocab_size": ROWS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "intermediate_size": UNITS,
        "num_hidden_layers": LAYERS, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    })  # fmt: skip
    return folder
