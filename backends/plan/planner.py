"""Plans of graphs for one kind of device; made without touching memory, threads or compilers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from runtime.backends.passes.packing import Options
from runtime.backends.passes.prepare import prepare
from runtime.backends.plan.lowering import Rules
from runtime.backends.plan.plan import Plan
from runtime.ops.graph import Graph
from runtime.ops.registry import Kind, kind_of
from runtime.ops.tensor import Tensor


class Planner:
    """Equal graphs give the same plan. A device says its rules, and what its memory holds.

    readable: types whose rows a kernel reads as the file has them.
    """

    readable: Collection[str] = ()

    def __init__(self, options: Options) -> None:
        self.options = options
        self._plans: dict[str, Plan] = {}

    def rules(self) -> Rules:
        """The device's rules; imported when the first plan is made."""
        raise NotImplementedError

    def packed_nbytes(self, weight: Tensor) -> int:
        """Bytes of a weight, of all experts, as products read it."""
        raise NotImplementedError

    def page_nbytes(self, leaf: Tensor) -> int:
        """Bytes of one page of all KV heads of a layer, or of one slot."""
        raise NotImplementedError

    def distinct_sizes(self, graph: Graph, sizes: Sequence[int]) -> list[int]:
        """See backends/base.py."""
        raise NotImplementedError

    def plan(self, graph: Graph, guarded: bool = False) -> Plan:
        """The plan of a graph, not yet bound to memory."""
        key = f"{graph.key()} {guarded}"
        if key not in self._plans:
            self._plans[key] = self.rules().plan(prepare(graph, self.options), guarded)
        return self._plans[key]

    def weights_nbytes(self, read: Mapping[tuple[Tensor, int], Tensor], rows: bool = True) -> int:
        """Bytes of weights in the forms that the plan of a model's graph reads.

        read: (node, number of an input) of the plain graph -> the weight that it is. rows: with
        those of which rows are looked up, which devices that work together have once.
        """
        found = {}
        for (node, number), weight in read.items():
            form = self._form(node, number)
            if kind_of(node) is not Kind.VIEW and (rows or form != "raw"):
                found[form, weight.content] = self._nbytes(form, weight)
        return sum(found.values())

    def clear(self) -> None:
        """Forget all plans."""
        self._plans.clear()

    def _form(self, node: Tensor, number: int) -> str:
        """The form of a weight that a node reads as its input of that number."""
        if kind_of(node) is Kind.CONTRACTION and number == 1:
            return "repacked"
        readable = node.inputs[number].dtype.name in self.readable
        return "raw" if kind_of(node) is Kind.GATHER and readable else "vector"

    def _nbytes(self, form: str, weight: Tensor) -> int:
        if form == "repacked":
            return self.packed_nbytes(weight)
        return weight.nbytes if form == "raw" else 4 * weight.size
