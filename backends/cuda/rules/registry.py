"""Where the rules of CUDA devices are registered."""

from __future__ import annotations

from runtime.backends.cuda import products
from runtime.backends.passes import prepare  # noqa: F401  declares the ops of the passes
from runtime.backends.plan.lowering import Lowering, Rules
from runtime.ops.graph import Graph


class CudaRules(Rules):
    """Rules whose calls are joined where one launch can do the work of several."""

    def lower(self, graph: Graph) -> Lowering:
        """See plan/lowering.py."""
        lowering = super().lower(graph)
        kept = {lowering.results[o.base] for o in graph.outputs if o.base in lowering.results}
        lowering.calls = products.join(lowering.calls, kept)
        return lowering


RULES = CudaRules("cuda", "backends/cuda/rules")
lowers = RULES.lowers
