"""`config.json` of a checkpoint: what a model reads of it, and what would change its results."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.models.keys import LARGEST
from runtime.ops.errors import ModelError, shown

_RENAMED = {"num_local_experts": "num_experts", "experts_per_token": "num_experts_per_tok"}

# Settings of models like these that nothing here implements, with the values that change nothing.
# None, and leaving it out, do so too.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "attn_logit_softcapping": (0,), "final_logit_softcapping": (0,), "clip_qkv": (),
    "logit_scale": (1,), "logits_scaling": (1,), "embedding_multiplier": (1,), "scale_emb": (1,),
    "residual_multiplier": (1,), "attention_multiplier": (), "query_pre_attn_scalar": (),
    "attn_temperature_tuning": (False,), "use_qk_norm": (False,), "qk_layernorm": (False,),
    "no_rope_layers": ([],), "parallel_attn": (False,), "alibi": (False,), "is_causal": (True,),
    "decoder_sparse_step": (1,), "mlp_only_layers": ([],), "first_k_dense_replace": (0,),
    "n_group": (1,), "topk_group": (1,), "routed_scaling_factor": (1,),
    "scoring_func": ("softmax",), "score_func": ("softmax",),
    "swiglu_limit": (7,), "swiglu_alpha": (1.702,), "attn_output_gate": (True,),
    "draft_vocab_size": (), "adapter_config": (), "num_labels": (),
}  # fmt: skip
_ROPE_TYPES = ("default", "linear", "yarn", "llama3")
_ROPE_READ = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "mrope_section"),
    *("mrope_interleaved", "factor", "original_max_position_embeddings", "truncate"),
    *("attention_factor", "attn_factor", "extrapolation_factor", "beta_fast", "beta_slow"),
    *("low_freq_factor", "high_freq_factor", "max_position_embeddings"),
}


_WORDS = ("rope_type", "type", "mrope_interleaved", "truncate")


class Config:
    """The settings of a checkpoint's text model.

    `rope`: those of its rotary embeddings, however old the file is. `path`: for messages.
    `kinds`: what a layer of its architecture can be.
    """

    kinds: Sequence[str] = ("full_attention", "sliding_attention", "linear_attention")

    def __init__(self, settings: Mapping[str, Any], path: Path) -> None:
        """ModelError: a setting changes results and is not implemented."""
        self.path = path
        text = settings.get("text_config")
        merged = {**settings, **text} if isinstance(text, Mapping) else dict(settings)
        self._settings = {_RENAMED.get(key, key): value for key, value in merged.items()}
        # the outer one says what the whole model is
        classes = settings.get("architectures")
        self.classes = [str(name) for name in classes] if isinstance(classes, list) else []
        self.rope = self._rope()
        for key, values in _NEUTRAL.items():
            if (value := self.get(key)) is not None and value not in values:
                raise self.refusal(key, value)

    def complete(self, defaults: Mapping[str, Any]) -> None:
        """Fill in what an architecture means where nothing is said."""
        self._settings = {**defaults, **self._settings}
        self.rope.setdefault("rope_theta", self.get("rope_theta", 10000.0))
        heads = self.size("num_attention_heads")
        if self.get("num_key_value_heads") is None:
            self._settings["num_key_value_heads"] = heads
        if "head_dim" in self._settings and self.get("head_dim") is None:
            self._settings["head_dim"] = self.size("hidden_size") // heads

    def get(self, key: str, default: Any = None) -> Any:
        """A setting; the default where it is null or left out."""
        value = self._settings.get(key)
        return default if value is None else value

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number above 0. ModelError: it is none, too large, or missing."""
        value = self.get(key, default)
        if type(value) is not int or not 0 < value <= LARGEST:
            what = "is missing" if value is None else f"= {shown(value)}, not 1 to {LARGEST}"
            raise ModelError(f"{self.path}: {key} {what}")
        return value

    def optional(self, key: str) -> int | None:
        """As `size`; None where it is null or left out."""
        return None if self.get(key) is None else self.size(key)

    def number(self, key: str, default: float) -> float:
        """A number. ModelError: it is none."""
        value = self.get(key, default)
        if not _is_number(value):
            raise ModelError(f"{self.path}: {key} = {shown(value)} is no number")
        return float(value)

    def head_dim(self) -> int:
        """Numbers of an attention head."""
        share = self.size("hidden_size") // self.size("num_attention_heads")
        return self.size("head_dim", share)

    def refusal(self, key: str, value: Any, why: str = "") -> ModelError:
        """The error about a setting that is not implemented."""
        return ModelError(
            f"{self.path}: {key} = {shown(value)} is not implemented{why}: the converted model "
            "would answer differently"
        )

    def layer_kinds(self) -> list[str] | None:
        """What each layer is, where the file says. ModelError: there are not as many, or one is
        of a kind that the architecture does not have."""
        kinds, layers = self.get("layer_types"), self.size("num_hidden_layers")
        if kinds is not None and (not isinstance(kinds, list) or len(kinds) != layers):
            raise ModelError(
                f"{self.path}: layer_types = {shown(kinds)} is not a list of {layers}, which "
                "num_hidden_layers says"
            )
        if others := [kind for kind in kinds or () if kind not in self.kinds]:
            raise ModelError(
                f"{self.path}: layer_types has {shown(others[0])}, which is not implemented for "
                f"this architecture; there are {', '.join(self.kinds)}"
            )
        return kinds

    def context(self, windows: bool) -> int | None:
        """Positions of the longest text; where no `windows` are implemented, no more than what
        all layers see, with a warning."""
        context, window = self.optional("max_position_embeddings"), self.optional("sliding_window")
        kinds = self.layer_kinds()
        if kinds is not None:
            slides = "sliding_attention" in kinds
        else:
            slides = self.get("use_sliding_window", True) and (
                self.number("max_window_layers", 0) < self.size("num_hidden_layers")
            )
        if kinds is not None and slides:
            self.size("sliding_window")
        if windows or not (slides and window and context and window < context):
            return context
        warnings.warn(
            f"{self.path}: sliding_window = {window} is not implemented for this architecture, so "
            f"the context is {window} tokens, within which results are right",
            stacklevel=2,
        )
        return window

    def _rope(self) -> dict[str, Any]:
        rope = self.get("rope_parameters", self.get("rope_scaling", {}))
        if not isinstance(rope, Mapping):
            raise ModelError(f"{self.path}: the rotary settings are {shown(rope)}, not an object")
        found = {key: value for key, value in rope.items() if value is not None}
        for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
            if self.get(key) is not None:
                found.setdefault(key, self.get(key))
        kind = found.setdefault("rope_type", found.get("type", "default"))
        if kind == "mrope":  # old name of the plain one with sections
            kind = found["rope_type"] = "default"
        if not isinstance(kind, str) or kind not in _ROPE_TYPES:
            raise ModelError(
                f"{self.path}: rope scaling {shown(kind)} is not implemented; "
                f"there are {', '.join(_ROPE_TYPES)}"
            )
        for key, value in found.items():
            if key not in _ROPE_READ:
                raise self.refusal(f"rope setting {key}", value)
            sections = isinstance(value, list) and all(type(n) is int for n in value)
            if not (sections if key == "mrope_section" else key in _WORDS or _is_number(value)):
                raise ModelError(f"{self.path}: rope setting {key} = {shown(value)} cannot be used")
        return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and abs(value) < 1e38
