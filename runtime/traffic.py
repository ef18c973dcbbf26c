"""What a step sees, and what a decoded token moves: for tables, benchmarks and forecasts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.ops.cost import Seen, flops, moves
from runtime.ops.graph import Graph
from runtime.ops.registry import Kind, kind_of
from runtime.ops.tensor import Tensor


@dataclass(frozen=True)
class Traffic:
    """Of one decoded token: bytes of weights, KV cache and recurrent state, and multiplications.

    `macs` are multiplications of weights, without the output matrix, which only the last token
    of a prompt meets.
    """

    weights: float
    kv: float
    state: float
    macs: float

    @property
    def nbytes(self) -> float:
        """All bytes together."""
        return self.weights + self.kv + self.state


def token_step(file: Any, kv_types: tuple[str, str]) -> tuple[Any, Any]:
    """The architecture of an open GGUF file, and a `Step` of one token, one page and one slot.

    ModelError for an architecture that cannot be run.
    """
    from runtime.models.registry import build, drafting, one_token

    architecture = drafting(build(file))
    return architecture, one_token(architecture, kv_types)


def of_file(file: Any, kv_types: tuple[str, str], context: int) -> Traffic:
    """What one token of an open GGUF file's model moves after `context` tokens."""
    architecture, step = token_step(file, kv_types)
    return of_token(architecture.graph(step), context)


def of_token(graph: Graph, context: int) -> Traffic:
    """What one token moves after `context` tokens, by a graph of one token and one slot.

    Of the cache what is read, and of a weight that is used twice the larger part.
    """
    seen = Seen(lengths=(context,))
    weights: dict[Tensor, float] = {}
    kv = state = macs = 0.0
    for node in graph.nodes:
        kind = kind_of(node)
        if kind is Kind.LEAF:
            continue
        for tensor, nbytes, written in moves(node, seen):
            base = tensor.base
            if base.op == "weight":
                weights[base] = max(nbytes, weights.get(base, 0.0))
            elif base.attrs.get("storage") == "slots":
                state += nbytes
            elif base.op == "state" and not written:
                kv += nbytes
        if kind is Kind.CONTRACTION and getattr(node.shape[0], "name", "") != "outputs":
            macs += flops(node, seen) / 2
    return Traffic(sum(weights.values()), kv, state, macs)


def seen_by(
    inputs: Mapping[str, np.ndarray], live: Mapping[str, int],
    page_nbytes: Callable[[Tensor], float],
) -> Seen:  # fmt: skip
    """What a step of these inputs sees; `places` and `sequences` are int32 by token."""
    last: dict[int, int] = {}
    for sequence, place in zip(inputs["sequences"], inputs["places"], strict=True):
        last[int(sequence)] = max(int(place), last.get(int(sequence), 0))
    return Seen(live, tuple(n + 1 for n in last.values()), page_nbytes)
