"""What a GGUF file says about itself, without loading the model."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

from runtime.memory.budget import Memory

# general.file_type -> name, as llama.cpp prints it
_FILE_TYPES = {
    0: "all F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K - Medium",
    11: "Q3_K - Small",
    12: "Q3_K - Medium",
    13: "Q3_K - Large",
    14: "Q4_K - Small",
    15: "Q4_K - Medium",
    16: "Q5_K - Small",
    17: "Q5_K - Medium",
    18: "Q6_K",
    19: "IQ2_XXS - 2.0625 bpw",
    20: "IQ2_XS - 2.3125 bpw",
    21: "Q2_K - Small",
    22: "IQ3_XS - 3.3 bpw",
    23: "IQ3_XXS - 3.0625 bpw",
    24: "IQ1_S - 1.5625 bpw",
    25: "IQ4_NL - 4.5 bpw",
    26: "IQ3_S - 3.4375 bpw",
    27: "IQ3_S mix - 3.66 bpw",
    28: "IQ2_S - 2.5 bpw",
    29: "IQ2_M - 2.7 bpw",
    30: "IQ4_XS - 4.25 bpw",
    31: "IQ1_M - 1.75 bpw",
    32: "BF16",
    36: "TQ1_0 - 1.69 bpw ternary",
    37: "TQ2_0 - 2.06 bpw ternary",
    38: "MXFP4 MoE",
    39: "NVFP4",
    40: "Q1_0",
    41: "Q2_0",
}
_ROLES = (
    ("experts", re.compile(r"_exps\b|_chexps\b")),
    ("embedding", re.compile(r"^(token|position|token_types|per_layer_token)_embd")),
    ("output", re.compile(r"^output\.(weight|bias)")),
    ("norms", re.compile(r"norm")),
    ("recurrent", re.compile(r"\.(ssm|time_mix|channel_mix)")),
    ("attention", re.compile(r"attn")),
    ("feed-forward", re.compile(r"ffn")),
)


def n_params(file: Any) -> int:
    """Number of weights in an open GGUF file."""
    return sum(math.prod(tensor.shape) for tensor in file.tensors.values())


def model_name(file: Any) -> str:
    """`general.name`, or the file's name."""
    return str(file.get("general.name") or file.path.stem)


def has_chat_template(file: Any) -> bool:
    """Whether a file says how messages become a prompt."""
    return any(key.startswith("tokenizer.chat_template") for key in file.metadata)


def type_name(file: Any) -> str:
    """The quantisation: "Q4_K - Medium"; from the tensors where the file does not say."""
    said = _FILE_TYPES.get(file.get("general.file_type"))
    if said:
        return said
    weights = bytes_by(file, "type")
    return max(weights, key=lambda name: weights[name]) if weights else "no tensors"


def model_type(file: Any) -> str:
    """Architecture, size and quantisation as in llama-bench: "qwen3 0.6B Q4_0"."""
    label = file.get("general.size_label")
    n = n_params(file)
    if not isinstance(label, str) or not label:
        label = f"{n / 1e9:.1f}B" if n >= 1e8 else f"{n / 1e6:.1f}M"
    return f"{file.get('general.architecture', '?')} {label} {type_name(file)}"


def role(name: str) -> str:
    """What a tensor is for, by its name."""
    return next((role for role, pattern in _ROLES if pattern.search(name)), "other")


def bytes_by(file: Any, what: str) -> dict[str, float]:
    """Bytes of the tensors by "type" or by "role"."""
    found: Counter[str] = Counter()
    for tensor in file.tensors.values():
        found[tensor.dtype.name.upper() if what == "type" else role(tensor.name)] += tensor.nbytes
    return dict(found)


def memory(file: Any, kv_type: str) -> Memory:
    """What the model of an open file needs with K and V of one type.

    A `runtime.Error` says why a file cannot be run, or that its heads do not fit the type.
    """
    from runtime.ops.cost import page_nbytes
    from runtime.traffic import token_step

    _, step = token_step(file, (kv_type, kv_type))
    page = sum(page_nbytes(leaf) for leaf in (*step.k.values(), *step.v.values()))
    state = sum(leaf.nbytes for leaf in (*step.conv.values(), *step.delta.values()))
    return Memory(file.tensors_nbytes, page, state)
