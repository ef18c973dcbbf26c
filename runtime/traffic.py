"""Bytes that a step must move: by a token's graph, and by each call of a plan.

Counted is what is used: of experts those that are chosen, of an embedding the rows looked up, of
the KV cache what attention sees, of recurrent state one slot read and one written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.ops import PAGE
from runtime.ops.graph import Graph
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
    from runtime.models.registry import build, one_token

    architecture = build(file)
    return architecture, one_token(architecture, kv_types)


def of_file(file: Any, kv_types: tuple[str, str], context: int) -> Traffic:
    """What one token of an open GGUF file's model moves after `context` tokens."""
    architecture, step = token_step(file, kv_types)
    return of_token(architecture.graph(step), context)


def of_token(graph: Graph, context: int) -> Traffic:
    """What one token moves after `context` tokens, by a graph of one token and one slot."""
    shares: dict[Tensor, float] = {}
    kv = state = macs = 0.0
    for node in graph.nodes:
        for place, x in enumerate(node.inputs):
            base = x.base
            if base.op == "weight":
                share = _share(node, place)
                shares[base] = max(share, shares.get(base, 0.0))
                if node.op in ("matmul", "matmul_id") and not _of_outputs(node):
                    macs += share * math.prod(map(int, base.shape))
            elif base.op == "state" and base.attrs.get("kind") == "slots":
                state += 2 * base.nbytes
        if node.op == "attention":
            seen = min(context, node.attrs.get("window") or context)
            kv += seen * sum(kv_token_nbytes(pages) for pages in node.inputs[1:3])
    return Traffic(sum(x.nbytes * share for x, share in shares.items()), kv, state, macs)


def kv_token_nbytes(pages: Tensor) -> float:
    """Bytes that one token takes of a layer's K or V."""
    from runtime.backends.cpu.pages import page_nbytes

    return page_nbytes(pages) / PAGE


def _share(node: Tensor, place: int) -> float:
    """The share of a weight, input number `place` of a node of one token, that the node reads."""
    rows = int(node.inputs[place].shape[0])
    if node.op == "get_rows":
        return 1 / rows
    if node.op in ("matmul_id", "expert_bias"):
        chosen = int(node.inputs[2].shape[-1])
        return min(1.0, chosen / rows)
    return 1.0


def _of_outputs(node: Tensor) -> bool:
    return getattr(node.shape[0], "name", "") == "outputs"


@dataclass(frozen=True)
class LiveStep:
    """What one step of a plan works on: live counts, and the lengths of its sequences."""

    live: Mapping[str, int]
    lengths: tuple[int, ...]
    experts: tuple[int, int]  # chosen by a token, in all; (0, 0) for a model without

    @staticmethod
    def of(file: Any, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]) -> LiveStep:
        """From a step's inputs; `places` and `sequences` are int32 by token."""
        last: dict[int, int] = {}
        for sequence, place in zip(inputs["sequences"], inputs["places"], strict=True):
            last[int(sequence)] = max(int(place), last.get(int(sequence), 0))
        keys = (f"{file.architecture}.expert_{name}" for name in ("used_count", "count"))
        used, count = (int(file.get(key) or 0) for key in keys)
        return LiveStep(live, tuple(n + 1 for n in last.values()), (used, count))

    def nbytes(self, call: Any) -> float:
        """Bytes that a call of a plan reads and writes in this step."""
        buffers = dict.fromkeys((*call.reads, *call.writes))
        return sum(self._of_buffer(call, buffer) for buffer in buffers)

    def _of_buffer(self, call: Any, buffer: Any) -> float:
        if buffer.kind == "state":
            return self._of_state(call, buffer)
        if buffer.kind in ("raw", "vector", "packed"):
            return self._of_weight(call, buffer)
        first = buffer.tensor.shape[0] if buffer.tensor is not None and buffer.tensor.ndim else 1
        capacity = int(first)
        return buffer.nbytes * self.live.get(getattr(first, "name", ""), capacity) / capacity

    def _of_weight(self, call: Any, buffer: Any) -> float:
        tokens = self.live["tokens"]
        if call.kernel.name == "get_rows":
            return min(buffer.nbytes, tokens * call.arguments["row_bytes"])
        used, experts = self.experts
        if "_exps" in buffer.key and experts:
            return buffer.nbytes * min(1.0, tokens * used / experts)
        return buffer.nbytes

    def _of_state(self, call: Any, buffer: Any) -> float:
        leaf = buffer.tensor
        if leaf.attrs.get("kind") == "slots":
            return 2 * leaf.nbytes / int(leaf.shape[0]) * len(self.lengths)
        if buffer in call.writes:
            return kv_token_nbytes(leaf) * self.live["tokens"]
        window = call.arguments.get("window", 0)
        return kv_token_nbytes(leaf) * sum(min(n, window or n) for n in self.lengths)
