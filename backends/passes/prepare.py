"""The passes from a model's graph to a device's, in order."""

from __future__ import annotations

from runtime.backends.passes.fuse_attention import (
    fuse_attention_pack,
    fuse_gate,
    fuse_qkv,
    fuse_rotation,
)  # fmt: skip
from runtime.backends.passes.fuse_collectives import write_gathered
from runtime.backends.passes.fuse_delta import fuse_delta, fuse_delta_layer, fuse_gated_norm
from runtime.backends.passes.fuse_experts import fuse_experts
from runtime.backends.passes.fuse_ffn import fuse_packs, fuse_router
from runtime.backends.passes.fuse_sums import fuse_sums
from runtime.backends.passes.packing import Options, pack_inputs
from runtime.ops.graph import Graph, rewrite
from runtime.ops.passes import select_early
from runtime.ops.rows import select_rows
from runtime.ops.tensor import Dim, Tensor

# pass(graph, options) -> graph. The first is needed, the others only spare work.
PASSES = (
    pack_inputs, fuse_delta, fuse_sums, fuse_gate, fuse_gated_norm, fuse_delta_layer, fuse_packs,
    fuse_qkv, fuse_rotation, fuse_attention_pack, fuse_experts, fuse_router, write_gathered,
)  # fmt: skip


def prepare(graph: Graph, options: Options) -> Graph:
    """All passes, or with `fuse=False` those alone that no plan can do without."""
    if not options.fuse:
        return pack_inputs(graph, options)
    graph = choose_rows(graph)
    for each in PASSES:
        graph = each(graph, options)
    return graph


def choose_rows(graph: Graph) -> Graph:
    """Only the rows that are wanted, from as early on as possible."""
    return select_early(_only_row(graph))


def _only_row(graph: Graph) -> Graph:
    """Without the choice of output rows where a step has room for one token, and so for no other.

    What follows keeps its live count: none, if the step wants no output.
    """

    def select(node: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        if all(isinstance(n, Dim) and n == 1 for n in (node.shape[0], x.shape[0])):
            return x
        return node.with_(inputs=(x, ids))

    return rewrite(graph, {select_rows: select})
