"""The passes from a model's graph to the CPU's, in order."""

from __future__ import annotations

from runtime.backends.cpu.fuse_attention import fuse_gate, fuse_qkv
from runtime.backends.cpu.fuse_delta import fuse_gated_norm
from runtime.backends.cpu.fuse_ffn import fuse_packs, fuse_router
from runtime.backends.cpu.fuse_sums import fuse_sums
from runtime.backends.cpu.rewrite import Options, pack_inputs
from runtime.ops.graph import Graph
from runtime.ops.passes import select_early

# pass(graph, options) -> graph. The first is needed, the others only spare work.
PASSES = (
    pack_inputs, fuse_sums, fuse_gate, fuse_gated_norm, fuse_packs, fuse_qkv, fuse_router,
)  # fmt: skip


def prepare(graph: Graph, options: Options) -> Graph:
    """All passes, or with `fuse=False` those alone that no plan can do without."""
    if not options.fuse:
        return pack_inputs(graph, options)
    graph = select_early(graph)
    for each in PASSES:
        graph = each(graph, options)
    return graph
