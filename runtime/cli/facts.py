"""What a GGUF file says about itself, without loading the model."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

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


def active_bytes(file: Any, kv_types: tuple[str, str], context: int) -> float:
    """Bytes that one decoded token has to read after `context` tokens.

    All weights but an embedding that is only looked up; of experts the share that is used; and
    the KV cache.
    """
    weights = sum(t.nbytes * _used(file, t.name) for t in file.tensors.values())
    cache = sum((kv_bytes_per_token(file, kind) or 0) / 2 for kind in kv_types)
    return weights + context * cache


def macs_per_token(file: Any) -> float:
    """Multiplications of weights that one token of a prompt takes.

    The output matrix does not count: only a prompt's last token meets it.
    """
    return sum(
        math.prod(t.shape) * _used(file, t.name)
        for t in file.tensors.values()
        if len(t.shape) > 1 and role(t.name) not in ("embedding", "output")
    )


def _used(file: Any, name: str) -> float:
    """The share of a tensor that one token reads."""
    if role(name) == "embedding":
        # without an output matrix of its own the embedding serves as one
        return float(name == "token_embd.weight" and "output.weight" not in file.tensors)
    if role(name) != "experts":
        return 1.0
    keys = (f"{file.get('general.architecture')}.expert_{key}" for key in ("used_count", "count"))
    used, experts = (file.get(key) for key in keys)
    return used / experts if used and experts else 1.0


def kv_bytes_per_token(file: Any, kv_type: str) -> int | None:
    """Bytes of KV cache one token takes; None for an architecture that cannot be run.

    `kv_type` is one type's name, used for K and V.
    """
    from runtime.errors import Error
    from runtime.models.registry import build
    from runtime.ops.dtypes import DTYPES, nbytes_for

    try:
        layers = build(file).layers.attention.values()
    except Error:
        return None
    dtype = DTYPES[kv_type]
    return sum(
        nbytes_for(dtype, (layer.kv_heads, dim))
        for layer in layers
        for dim in (layer.k_dim, layer.v_dim)
    )
