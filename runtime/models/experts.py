"""Mixture of experts: which experts a token uses, and the networks themselves. Shapes: T tokens."""

from __future__ import annotations

from dataclasses import dataclass

from runtime import ops
from runtime.errors import ModelError
from runtime.models.blocks import linear, swiglu
from runtime.models.keys import Keys
from runtime.models.step import Weights
from runtime.ops.tensor import Tensor

# `expert_gating_func` of GGUF files: how scores become weights of the chosen experts
SOFTMAX, SIGMOID, SOFTMAX_OF_CHOSEN = 1, 2, 3


@dataclass(frozen=True)
class Experts:
    """`used` of `count` networks of `inner` units per token, and a shared one of `shared` units.

    gating: one of the three above. normalize: the chosen weights are made to sum to 1, and then
    multiplied by `scale`. limit: bound of the clamped SwiGLU (gpt-oss), 0 for the plain one.
    """

    count: int
    used: int
    inner: int
    shared: int = 0
    gating: int = SOFTMAX
    normalize: bool = True
    scale: float = 1.0
    limit: float = 0.0

    @staticmethod
    def read(keys: Keys, w: Weights, gating: int = SOFTMAX, limit: float = 0.0) -> Experts:
        """From metadata; ModelError for what is missing, contradictory or not implemented.

        Some files leave out the sizes of shared experts, which are those of the tensors then.
        """
        count, used = keys.count("expert_count"), keys.count("expert_used_count")
        if used > count:
            raise ModelError(
                f"{keys.source}: expert_used_count {used} of {count} experts: the metadata "
                "contradicts itself"
            )
        chosen = keys.count("expert_gating_func", gating, least=0) or gating
        if chosen not in (SOFTMAX, SIGMOID, SOFTMAX_OF_CHOSEN):
            raise ModelError(
                f"{keys.source}: {keys.architecture}.expert_gating_func = {chosen} is not "
                "implemented; 1 (softmax), 2 (sigmoid) and 3 (softmax of the chosen) are"
            )
        shared = next((t for n, t in w.tensors.items() if n.endswith("ffn_up_shexp.weight")), None)
        found = int(shared.shape[0]) if shared is not None and shared.shape else 0
        return Experts(
            count, used, keys.count("expert_feed_forward_length"),
            keys.count("expert_shared_feed_forward_length", found, least=0), chosen,
            keys.flag("expert_weights_norm", True), keys.number("expert_weights_scale", 1.0) or 1.0,
            limit,
        )  # fmt: skip


def moe_ffn(w: Weights, layer: int, x: Tensor, e: Experts) -> Tensor:
    """The experts of each token, weighted by the router, plus the shared one where there is."""
    at = f"blk.{layer}"
    scores = linear(w, f"{at}.ffn_gate_inp", x, e.count, f"{at}.scores")  # [T, count]
    ids, weights = _choice(scores, e, at)
    gate, up = (_of_experts(w, at, part, x, ids, (e.count, e.inner)) for part in ("gate", "up"))
    inner = swiglu(gate, up, f"{at}.swiglu", e.limit)  # [T, used, inner]
    y = _of_experts(w, at, "down", inner, ids, (e.count, x.shape[-1]))
    y = ops.expert_sum(y, weights, name=f"{at}.ffn_out")
    return ops.add(y, _shared(w, at, x, e), name=f"{at}.ffn_all") if e.shared else y


def _choice(scores: Tensor, e: Experts, at: str) -> tuple[Tensor, Tensor]:
    """Ids and weights of the chosen experts, [T, used] both."""
    if e.gating == SOFTMAX_OF_CHOSEN:
        ids = ops.top_k(scores, k=e.used, name=f"{at}.experts")
        weights = ops.softmax(ops.take(scores, ids), name=f"{at}.expert_weights")
    else:
        share = ops.softmax if e.gating == SOFTMAX else ops.sigmoid
        shares = share(scores, name=f"{at}.shares")
        ids = ops.top_k(shares, k=e.used, name=f"{at}.experts")
        weights = ops.take(shares, ids, name=f"{at}.expert_weights")
        if e.normalize:
            weights = ops.normalize(weights, name=f"{at}.expert_weights")
    return ids, weights if e.scale == 1 else ops.scale(weights, factor=e.scale)


def _of_experts(
    w: Weights, at: str, part: str, x: Tensor, ids: Tensor, size: tuple[int, int]
) -> Tensor:
    """x times the matrices of the chosen experts, plus their biases: [T, used, rows]."""
    name, both = f"{at}.ffn_{part}_exps", f"{at}.ffn_gate_up_exps.weight"
    if part != "down" and both in w.tensors:  # one tensor, the rows of gate before those of up
        rows = size[1]
        run = (0, rows) if part == "gate" else (rows, 2 * rows)
        stored = w.rows(both, part, (run,), size[0], 2 * rows, x.shape[-1])
    else:
        stored = w(f"{name}.weight", *size, x.shape[-1])
    y = ops.matmul_id(x, stored, ids, name=f"{at}.{part}")
    bias = w.optional(f"{name}.bias", *size)
    return y if bias is None else ops.expert_bias(y, bias, ids, name=f"{at}.{part}+bias")


def _shared(w: Weights, at: str, x: Tensor, e: Experts) -> Tensor:
    """The expert that every token uses, scaled by the sigmoid of one number per token."""
    gate = linear(w, f"{at}.ffn_gate_shexp", x, e.shared, f"{at}.shared_gate")
    up = linear(w, f"{at}.ffn_up_shexp", x, e.shared, f"{at}.shared_up")
    inner = swiglu(gate, up, f"{at}.shared_swiglu")
    y = linear(w, f"{at}.ffn_down_shexp", inner, x.shape[-1], f"{at}.shared_down")
    score = linear(w, f"{at}.ffn_gate_inp_shexp", x, 1, f"{at}.shared_score")  # [T, 1]
    return ops.row_scale(y, ops.sigmoid(score), name=f"{at}.shared_out")
