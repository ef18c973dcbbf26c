"""What is wrong with a converted model, in the words of the checkpoint that it was made of."""

from __future__ import annotations

import re
from collections.abc import Iterable

from runtime.conversion.architectures import OUTSIDE, Conversion

# key of a file, without its prefix -> setting of config.json
_SETTINGS = {
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.recurrent_layers": "layer_types",
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "layer_types", "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "expert_count": "num_experts", "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "expert_used_count": "num_experts_per_tok", "expert_weights_norm": "norm_topk_prob",
    "feed_forward_length": "intermediate_size",
    "full_attention_interval": "full_attention_interval",
    "rope.dimension_count": "partial_rotary_factor", "rope.dimension_sections": "mrope_section",
    "rope.freq_base": "rope_theta", "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.type": "rope_type", "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.group_count": "linear_num_key_heads", "ssm.inner_size": "linear_value_head_dim",
    "ssm.state_size": "linear_key_head_dim", "ssm.time_step_rank": "linear_num_value_heads",
}  # fmt: skip
_PHRASES = (
    (r"metadata key (\w+ of config.json) is missing.*", r"\1 is missing"),
    (r": convert the model with .*", ""),
    (r"the hyperparameters ask", "config.json asks"),
    (r"\bthe metadata\b", "config.json"),
    (r"\b(the|this) file\b", "the checkpoint"),
)
_TOGETHER = dict.fromkeys(
    ("ffn_gate_exps", "ffn_up_exps"), "ffn_gate_up_exps"
)  # one tensor of both


def translated(message: str, conversion: Conversion, tensors: Iterable[str]) -> str:
    """A message about a file of an architecture, for a checkpoint of these tensors.

    Keys become settings of config.json, names of tensors those of the checkpoint, and it is not
    said to convert the model again.
    """
    names = [*tensors]
    key = re.compile(rf"\b{re.escape(conversion.architecture)}\.([\w.]*\w)")
    said = key.sub(lambda found: _setting(*found.group(0, 1)), message)
    for pattern, instead in _PHRASES:
        said = re.sub(pattern, instead, said)
    return re.sub(r"'([a-z]\w*\.[\w.]+)'", lambda m: f"'{original(m[1], conversion, names)}'", said)


def _setting(whole: str, key: str) -> str:
    return f"{_SETTINGS[key]} of config.json" if key in _SETTINGS else whole


def original(name: str, conversion: Conversion, tensors: Iterable[str]) -> str:
    """What a checkpoint of these tensors calls a tensor of the file, whether it has it or not."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(.+?)(\.weight|\.bias)?", name)
    assert match is not None  # the pattern takes any text
    block, stem, tail = match[1], match[2], match[3] or ""
    known = OUTSIDE if block is None else conversion.names
    makes = (stem + tail, stem, _TOGETHER.get(stem))
    found = next((have for made in makes for have in known if known[have] == made), None)
    if found is None:
        return name
    whole = "" if known[found] == stem + tail and tail else tail
    inner = f"{found}{whole}" if block is None else f"layers.{block}.{found}{whole}"
    names = [*tensors]
    prefix = next((n.partition("layers.")[0] for n in names if "layers." in n), "model.")
    return next((n for n in names if f".{n}".endswith(f".{inner}")), prefix + inner)
