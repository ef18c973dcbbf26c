"""What is converted: one row for each architecture, of names, rules and keys of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from runtime.conversion import rules
from runtime.conversion.config import Config
from runtime.conversion.rules import Rule
from runtime.ops.errors import ModelError, shown

Keys = Callable[[Config, int], dict[str, Any]]  # of a model with so many blocks


@dataclass(frozen=True)
class Conversion:
    """One architecture.

    names: what stands between "model.layers.N." and ".weight" in a checkpoint -> the same in a
    file. rules: for those that are not copied as they are. keys: metadata of its own, without the
    prefix. defaults: settings of config.json where it says nothing. ahead: it may have blocks that
    predict further tokens (MTP). windows: some layers see the last tokens alone. rope_types: ways
    of stretching the context that it may have.
    """

    architecture: str
    classes: tuple[str, ...]
    names: Mapping[str, str]
    rules: Mapping[str, Rule] = field(default_factory=dict)
    keys: Keys = lambda config, blocks: {}
    defaults: Mapping[str, Any] = field(default_factory=lambda: {"rms_norm_eps": 1e-6})
    ahead: bool = False
    windows: bool = False
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")


_ATTENTION = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "input_layernorm": "attn_norm",
}  # fmt: skip
_FFN = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_DENSE = _ATTENTION | _FFN | {"post_attention_layernorm": "ffn_norm"}
_EXPERTS = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_up_proj": "ffn_gate_up_exps", "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.experts.#.gate_proj": "ffn_gate_exps", "mlp.experts.#.up_proj": "ffn_up_exps",
    "mlp.experts.#.down_proj": "ffn_down_exps",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}  # fmt: skip
_HYBRID = _DENSE | {
    "post_attention_layernorm": "post_attention_norm",
    "linear_attn.A_log": "ssm_a", "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.dt_bias": "ssm_dt.bias", "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta", "linear_attn.in_proj_ba": "ssm_ba",
    "linear_attn.in_proj_qkv": "attn_qkv", "linear_attn.in_proj_qkvz": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate", "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
    "eh_proj": "nextn.eh_proj", "enorm": "nextn.enorm", "hnorm": "nextn.hnorm",
    "shared_head.norm": "nextn.shared_head_norm",
}  # fmt: skip
_HYBRID_DEFAULTS = {"rms_norm_eps": 1e-6, "head_dim": 256}
OUTSIDE = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}

_EXPERT_RULES = {"mlp.experts.gate_up_proj": rules.halves}
_NORMS = ("input_layernorm", "post_attention_layernorm", "norm", "enorm", "hnorm",
          "shared_head.norm", "self_attn.q_norm", "self_attn.k_norm")  # fmt: skip
_HYBRID_RULES: dict[str, Rule] = _EXPERT_RULES | dict.fromkeys(_NORMS, rules.plus_one)
_TILED_RULES: dict[str, Rule] = _HYBRID_RULES | {
    "linear_attn.A_log": rules.decay, "linear_attn.dt_bias": rules.tiled_heads,
    "linear_attn.in_proj_a": rules.tiled_heads, "linear_attn.in_proj_b": rules.tiled_heads,
    "linear_attn.in_proj_qkv": rules.tiled_queries_keys_values,
    "linear_attn.in_proj_z": rules.tiled_gate, "linear_attn.conv1d": rules.tiled_filter,
    "linear_attn.out_proj": rules.tiled_columns,
}  # fmt: skip
_LLAMA_RULES: dict[str, Rule] = {
    "self_attn.q_proj": rules.rotated("num_attention_heads"),
    "self_attn.k_proj": rules.rotated("num_key_value_heads"),
}


def _llama_keys(config: Config, blocks: int) -> dict[str, Any]:
    return {"vocab_size": config.size("vocab_size"), "rope.dimension_count": config.head_dim()}


def _expert_keys(config: Config, blocks: int, normalised: bool = False) -> dict[str, Any]:
    """normalised: what a file means that leaves out norm_topk_prob."""
    found = {
        "expert_feed_forward_length": config.get("moe_intermediate_size"),
        "expert_shared_feed_forward_length": config.get("shared_expert_intermediate_size"),
    }
    if not config.get("norm_topk_prob", normalised):
        found["expert_weights_norm"] = False
    return {key: value for key, value in found.items() if value is not None}


def _gpt_oss_keys(config: Config, blocks: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "attention.sliding_window": config.size("sliding_window"),
        "expert_feed_forward_length": config.size("intermediate_size"),
    }
    kinds = config.layer_kinds() or []
    slides = [kind == "sliding_attention" for kind in kinds]
    if any(here != (i % 2 == 0) for i, here in enumerate(slides)):
        found["attention.sliding_window_pattern"] = slides
    return found


def _hybrid_keys(config: Config, blocks: int) -> dict[str, Any]:
    layers, values = config.size("num_hidden_layers"), config.size("linear_num_value_heads")
    found = _expert_keys(config, blocks, normalised=True)
    if blocks > layers:
        found["nextn_predict_layers"] = blocks - layers
    found |= {
        "ssm.conv_kernel": config.size("linear_conv_kernel_dim"),
        "ssm.state_size": config.size("linear_key_head_dim"),
        "ssm.group_count": config.size("linear_num_key_heads"),
        "ssm.time_step_rank": values,
        "ssm.inner_size": values * config.size("linear_value_head_dim"),
    }
    interval = config.size("full_attention_interval", 4)
    kinds = config.layer_kinds()
    recurrent = [
        (i + 1) % interval != 0 if kinds is None else kinds[i] == "linear_attention"
        for i in range(layers)
    ]
    found["attention.recurrent_layers"] = recurrent + [False] * (blocks - layers)
    found["full_attention_interval"] = interval
    share = config.rope.get("partial_rotary_factor", 0.25)
    return found | {"rope.dimension_count": int(config.head_dim() * share)}


def _qwen35_keys(config: Config, blocks: int) -> dict[str, Any]:
    found = _hybrid_keys(config, blocks)
    if "mrope_section" not in config.rope:
        found["rope.dimension_sections"] = [11, 11, 10, 0]
    return found


CONVERSIONS = (
    Conversion(
        "llama", ("LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM"), _DENSE,
        _LLAMA_RULES, _llama_keys, {"rms_norm_eps": 1e-6, "head_dim": None},
        rope_types=("default", "linear", "yarn", "llama3"),
    ),
    Conversion(
        "qwen2", ("Qwen2ForCausalLM",), _DENSE,
        defaults={"rms_norm_eps": 1e-6, "attention_bias": True},
    ),
    Conversion(
        "qwen3", ("Qwen3ForCausalLM",), _DENSE, defaults={"rms_norm_eps": 1e-6, "head_dim": 128}
    ),
    Conversion(
        "qwen3moe", ("Qwen3MoeForCausalLM",), _DENSE | _EXPERTS, _EXPERT_RULES, _expert_keys
    ),
    Conversion(
        "gpt-oss", ("GptOssForCausalLM",),
        _ATTENTION | {
            "post_attention_layernorm": "post_attention_norm", "mlp.router": "ffn_gate_inp",
            "self_attn.sinks": "attn_sinks.weight", "mlp.experts.gate_up_proj": "ffn_gate_up_exps",
            "mlp.experts.down_proj": "ffn_down_exps",
            "mlp.experts.gate_up_proj_bias": "ffn_gate_up_exps",
            "mlp.experts.down_proj_bias": "ffn_down_exps.bias",
        },
        {
            "mlp.experts.gate_up_proj": rules.turned, "mlp.experts.down_proj": rules.turned,
            "mlp.experts.gate_up_proj_bias": rules.biases_in_turns,
        },
        _gpt_oss_keys, {"rms_norm_eps": 1e-5, "head_dim": 64, "sliding_window": 128}, windows=True,
    ),
    Conversion(
        "qwen3next", ("Qwen3NextForCausalLM",), _HYBRID | _EXPERTS,
        _HYBRID_RULES | {
            "linear_attn.A_log": rules.grouped_decay, "linear_attn.conv1d": rules.flat_filter,
            "linear_attn.in_proj_qkvz": rules.mixed_queries_keys_values,
        },
        _hybrid_keys, _HYBRID_DEFAULTS, ahead=True,
    ),
    Conversion(
        "qwen35", ("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"), _HYBRID,
        _TILED_RULES, _qwen35_keys, _HYBRID_DEFAULTS, ahead=True,
    ),
    Conversion(
        "qwen35moe", ("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM"),
        _HYBRID | _EXPERTS, _TILED_RULES, _qwen35_keys, ahead=True,
    ),
)  # fmt: skip


def conversion_of(config: Config) -> Conversion:
    """The row for a checkpoint, whose settings are completed by it.

    ModelError: there is none, or it cannot have such settings.
    """
    found = next((c for c in CONVERSIONS for name in config.classes if name in c.classes), None)
    if found is None:
        known = ", ".join(sorted(c.classes[0] for c in CONVERSIONS))
        what = shown(config.classes[0]) if config.classes else "none"
        raise ModelError(f"{config.path}: architecture {what} is not converted; there are {known}")
    config.complete(found.defaults)
    config.kinds = ("full_attention", f"{'linear' if found.ahead else 'sliding'}_attention")
    config.layer_kinds()
    rope = config.rope
    if rope["rope_type"] not in found.rope_types:
        raise config.refusal("rope scaling", rope["rope_type"], f" for {found.architecture}")
    if not found.ahead and rope.get("partial_rotary_factor", 1) != 1:
        raise config.refusal("partial_rotary_factor", rope["partial_rotary_factor"])
    whole = found.architecture != "gpt-oss"  # whether YaRN's ramp is rounded to dimensions
    if rope["rope_type"] == "yarn" and rope.get("truncate", True) is not whole:
        raise config.refusal("rope setting truncate", rope.get("truncate", True))
    return found
