"""Mixture of experts: which experts a token uses, and the networks themselves. Shapes: T tokens."""

from __future__ import annotations

from dataclasses import dataclass

from runtime import ops
from runtime.errors import ModelError
from runtime.models.blocks import swiglu
from runtime.models.keys import Keys
from runtime.models.linear import linear, scaled_by_expert
from runtime.models.weights import Weights
from runtime.ops.cuts import Runs
from runtime.ops.tensor import Tensor

# `expert_gating_func` of GGUF files: how scores become weights of the chosen experts
SOFTMAX, SIGMOID, SOFTMAX_OF_CHOSEN = 1, 2, 3


@dataclass(frozen=True)
class Experts:
    """`per_token` of `count` networks of `intermediate` units, and a shared one of `shared` units.

    gating: one of the three above. normalize: the chosen weights are made to sum to 1, and then
    multiplied by `scale`. limit: bound of the clamped SwiGLU (gpt-oss), 0 for the plain one.
    interleaved: where gate and up are one tensor their rows take turns (gpt-oss); else they
    follow each other.
    """

    count: int
    per_token: int
    intermediate: int
    shared: int = 0
    gating: int = SOFTMAX
    normalize: bool = True
    scale: float = 1.0
    limit: float = 0.0
    interleaved: bool = False

    @staticmethod
    def read(
        keys: Keys, w: Weights, gating: int = SOFTMAX, limit: float = 0.0, interleaved: bool = False
    ) -> Experts:
        """From metadata; ModelError for what is missing, contradictory or not implemented.

        Some files leave out the sizes of experts, which are those of the tensors then.
        """
        keys.read.add("feed_forward_length")  # of layers without experts
        count, per_token = keys.count("expert_count"), keys.count("expert_used_count")
        if per_token > count:
            raise ModelError(
                f"{keys.source}: expert_used_count {per_token} of {count} experts: the metadata "
                "contradicts itself"
            )
        chosen = keys.count("expert_gating_func", gating, least=0) or gating
        if chosen not in (SOFTMAX, SIGMOID, SOFTMAX_OF_CHOSEN):
            raise ModelError(
                f"{keys.source}: {keys.architecture}.expert_gating_func = {chosen} is not "
                "implemented; 1 (softmax), 2 (sigmoid) and 3 (softmax of the chosen) are"
            )
        shared = keys.count(
            "expert_shared_feed_forward_length", _units(w, "ffn_down_shexp.weight") or 0, least=0
        )
        if keys.count("expert_shared_count", 1 if shared else 0, least=0) and not shared:
            raise ModelError(
                f"{keys.source}: {keys.architecture}.expert_shared_count asks for a shared expert, "
                "but the file has no size and no tensors of one: the metadata contradicts itself"
            )
        intermediate = keys.count("expert_feed_forward_length", _units(w, "ffn_down_exps.weight"))
        norm = keys.flag("norm_top_k_prob", True)  # Ollama's key
        return Experts(
            count, per_token, intermediate, shared, chosen, keys.flag("expert_weights_norm", norm),
            keys.number("expert_weights_scale", 1.0) or 1.0, limit, interleaved,
        )  # fmt: skip


def _units(w: Weights, tail: str) -> int | None:
    """Inner units by the tensors: what the first matrix of this name takes in."""
    found = next((t.shape for name, t in w.tensors.items() if name.endswith(f".{tail}")), ())
    return int(found[-1]) if found else None


def moe_ffn(w: Weights, layer: int, x: Tensor, e: Experts) -> Tensor:
    """The experts of each token, weighted by the router, plus the shared one where there is."""
    at = f"blk.{layer}"
    scores = linear(w, f"{at}.ffn_gate_inp", x, e.count, f"{at}.scores")  # [T, count]
    ids, weights = _choice(scores, e, at)
    gate, up = (_of_experts(w, at, part, x, ids, e, e.intermediate) for part in ("gate", "up"))
    inner = swiglu(gate, up, f"{at}.swiglu", e.limit)  # [T, per_token, intermediate]
    y = _of_experts(w, at, "down", inner, ids, e, x.shape[-1])
    y = ops.expert_sum(y, weights, name=f"{at}.ffn_out")
    return ops.add(y, _shared(w, at, x, e), name=f"{at}.ffn_all") if e.shared else y


def _choice(scores: Tensor, e: Experts, at: str) -> tuple[Tensor, Tensor]:
    """Ids and weights of the chosen experts, [T, per_token] both."""
    if e.gating == SOFTMAX_OF_CHOSEN:
        ids = ops.top_k(scores, k=e.per_token, name=f"{at}.experts")
        weights = ops.softmax(ops.take(scores, ids), name=f"{at}.expert_weights")
    else:
        share = ops.softmax if e.gating == SOFTMAX else ops.sigmoid
        shares = share(scores, name=f"{at}.shares")
        ids = ops.top_k(shares, k=e.per_token, name=f"{at}.experts")
        weights = ops.take(shares, ids, name=f"{at}.expert_weights")
        if e.normalize:
            weights = ops.normalize(weights, name=f"{at}.expert_weights")
    return ids, weights if e.scale == 1 else ops.scale(weights, factor=e.scale)


def _of_experts(
    w: Weights, at: str, part: str, x: Tensor, ids: Tensor, e: Experts, rows: int
) -> Tensor:
    """x times the matrices of the chosen experts, their scales, plus their biases.

    [T, per_token, rows]; gate and up may be halves of one tensor.
    """
    name, both = f"{at}.ffn_{part}_exps", f"{at}.ffn_gate_up_exps"
    stored: int = rows
    runs: Runs = ()
    if part != "down" and f"{both}.weight" in w:
        name, stored, runs = both, 2 * rows, _half(part == "up", rows, e.interleaved)
    matrices = w.rows(f"{name}.weight", part, runs, e.count, stored, x.shape[-1])
    y = ops.matmul_id(x, matrices, ids, name=f"{at}.{part}")
    y = scaled_by_expert(w, name, y, ids, e.count)
    if f"{name}.bias" not in w:
        return y
    bias = w.rows(f"{name}.bias", part, runs, e.count, stored, axis=-1)
    return ops.expert_bias(y, bias, ids, name=f"{at}.{part}+bias")


def _half(second: bool, rows: int, interleaved: bool) -> Runs:
    """Which of twice `rows` rows are the first matrix's, or the second's."""
    if interleaved:
        return tuple((i, i + 1) for i in range(second, 2 * rows, 2))
    return ((rows, 2 * rows),) if second else ((0, rows),)


def _shared(w: Weights, at: str, x: Tensor, e: Experts) -> Tensor:
    """The expert that every token uses, scaled by the sigmoid of one number per token."""
    gate = linear(w, f"{at}.ffn_gate_shexp", x, e.shared, f"{at}.shared_gate")
    up = linear(w, f"{at}.ffn_up_shexp", x, e.shared, f"{at}.shared_up")
    inner = swiglu(gate, up, f"{at}.shared_swiglu")
    y = linear(w, f"{at}.ffn_down_shexp", inner, x.shape[-1], f"{at}.shared_down")
    score = linear(w, f"{at}.ffn_gate_inp_shexp", x, 1, f"{at}.shared_score")  # [T, 1]
    return ops.row_scale(y, ops.sigmoid(score), name=f"{at}.shared_out")
