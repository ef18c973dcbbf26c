"""Plans of graphs for one kind of device; made without touching memory, threads or compilers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from runtime.backends.passes.packing import Options
from runtime.backends.passes.prepare import prepare
from runtime.backends.plan.lowering import Rules, multiplied
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

    def rows_from_tiles(self, weight: Tensor) -> bool:
        """Whether rows of a weight are looked up in its tiles, where products have some."""
        return False

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
        found = {
            (form, weight.content): self._nbytes(form, weight)
            for form, weight in self._forms(read)
            if rows or form != "raw"
        }
        return sum(found.values())

    def looks_up(self, read: Mapping[tuple[Tensor, int], Tensor]) -> bool:
        """Whether rows are looked up in weights as the file has them; see `weights_nbytes`."""
        return any(form == "raw" for form, _ in self._forms(read))

    def clear(self) -> None:
        """Forget all plans."""
        self._plans.clear()

    def _forms(
        self, read: Mapping[tuple[Tensor, int], Tensor]
    ) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
        """The weights that are read, each with the form it has there."""
        products = multiplied((node, n, weight) for (node, n), weight in read.items())
        for (node, number), weight in read.items():
            if kind_of(node) is not Kind.VIEW:
                tiles = weight.content in products and self.rows_from_tiles(weight)
                yield self._form(node, number, tiles), weight

    def _form(self, node: Tensor, number: int, tiles: bool) -> str:
        """The form of a weight that a node reads as its input of that number.

        tiles: whether there are some that rows can be looked up in.
        """
        is_product = kind_of(node) is Kind.CONTRACTION and number == 1
        if is_product or (tiles and kind_of(node) is Kind.GATHER):
            return "repacked"
        readable = node.inputs[number].dtype.name in self.readable
        return "raw" if kind_of(node) is Kind.GATHER and readable else "vector"

    def _nbytes(self, form: str, weight: Tensor) -> int:
        if form == "repacked":
            return self.packed_nbytes(weight)
        return weight.nbytes if form == "raw" else 4 * weight.size
