"""Plans of graphs for the CPU; made without touching memory, threads or compilers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from runtime.backends.cpu.abi import MAX_HEAD_DIM
from runtime.backends.cpu.tile.formats import NAMES, READABLE, packed_nbytes, tile_format
from runtime.backends.passes.packing import Options, distinct_sizes
from runtime.backends.passes.prepare import prepare
from runtime.backends.plan.plan import Plan
from runtime.ops.cost import page_nbytes
from runtime.ops.graph import Graph
from runtime.ops.registry import Kind, kind_of
from runtime.ops.tensor import Tensor


def options(
    activations: str = "int8", wide: int = 8, fuse: bool = True, split: bool = False
) -> Options:
    """See `Options`; split where the instruction set is AMX."""
    return Options(frozenset(NAMES), MAX_HEAD_DIM, activations, wide, fuse, split)


def make_plan(graph: Graph, options: Options, guarded: bool = False) -> Plan:
    """The plan of a graph; `guarded` leaves room behind buffers, to see stray writes."""
    from runtime.backends.cpu.rules import RULES

    return RULES.plan(prepare(graph, options), guarded)


class Planner:
    """Plans for one kind of CPU; equal graphs give the same plan."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._plans: dict[str, Plan] = {}

    def plan(self, graph: Graph, guarded: bool = False) -> Plan:
        """The plan of a graph, not yet bound to memory."""
        key = f"{graph.key()} {guarded}"
        if key not in self._plans:
            self._plans[key] = make_plan(graph, self.options, guarded)
        return self._plans[key]

    def weights_nbytes(self, read: Mapping[tuple[Tensor, int], Tensor], rows: bool = True) -> int:
        """Bytes of weights in the forms that the plan of a model's graph reads.

        read: (node, number of an input) of the plain graph -> the weight that it is. rows: with
        those of which rows are looked up, which devices that work together have once.
        """
        found = {}
        for (node, number), weight in read.items():
            form = _form(node, number)
            if kind_of(node) is not Kind.VIEW and (rows or form != "raw"):
                found[form, weight.content] = _nbytes(form, weight)
        return sum(found.values())

    def page_nbytes(self, leaf: Tensor) -> int:
        """Bytes of one page of all KV heads of a layer, or of one slot."""
        return page_nbytes(leaf)

    def distinct_sizes(self, graph: Graph, sizes: Sequence[int]) -> list[int]:
        """Of these numbers of tokens those whose plans use every kernel that any of them uses.

        graph: the step of one token of the model in question.
        """
        return distinct_sizes(graph, sizes, self.options)

    def clear(self) -> None:
        """Forget all plans."""
        self._plans.clear()


def _form(node: Tensor, number: int) -> str:
    """The form of a weight that a node reads as its input of that number."""
    if kind_of(node) is Kind.CONTRACTION and number == 1:
        return "repacked"
    readable = node.inputs[number].dtype.name in READABLE
    return "raw" if kind_of(node) is Kind.GATHER and readable else "vector"


def _nbytes(form: str, weight: Tensor) -> int:
    if form == "repacked":
        *experts, rows, inner = map(int, weight.shape)
        return math.prod(experts) * packed_nbytes(tile_format(weight.dtype), rows, inner)
    return weight.nbytes if form == "raw" else 4 * weight.size
