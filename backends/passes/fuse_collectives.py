"""Sums over devices fused with residuals, and gathers with the products around them."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.backends.passes.packing import Options, linear, node_of, only_user
from runtime.ops.collective import all_gather, all_sum, both
from runtime.ops.dtypes import DType
from runtime.ops.elementwise import add
from runtime.ops.graph import Graph, rewrite
from runtime.ops.matmul import matmul
from runtime.ops.registry import Kind, kind_of
from runtime.ops.tensor import Tensor


def fuse_residuals(graphs: Sequence[Graph]) -> list[Graph]:
    """Graphs of several devices with residuals as inputs of sums.

    A device may have no use for a sum that others add to, and together they make it only once: so
    a sum takes a residual where all devices have it.
    """
    found = [_residuals(graph) for graph in graphs]
    common = set.intersection(*(set(each.values()) for each in found))

    def fused(graph: Graph, numbers: dict[Tensor, tuple[int, int]]) -> Graph:
        def grow(node: Tensor, *new: Tensor) -> Tensor:
            if numbers.get(node) not in common:
                return node.with_(inputs=new)
            at = numbers[node][1]
            return node_of(
                all_sum, (*new[at].inputs, new[1 - at]), node, **new[at].attrs, residual=True
            )

        return rewrite(graph, {add: grow})

    return [fused(graph, numbers) for graph, numbers in zip(graphs, found, strict=True)]


def _residuals(graph: Graph) -> dict[Tensor, tuple[int, int]]:
    """Additions to sums: the number of the sum, and which input it is.

    What is added must not wait for a later meeting.
    """
    latest: dict[Tensor, int] = {}
    found = {}
    for node in graph.nodes:
        latest[node] = max((latest[x] for x in node.inputs), default=-1)
        if kind_of(node) is Kind.COLLECTIVE:
            latest[node] = max(latest[node], node.attrs["number"])
        for at in (0, 1) if add.made(node) else ():
            total, other = node.inputs[at], node.inputs[1 - at]
            if (
                all_sum.made(total)
                and only_user(graph, total)
                and other.shape == total.shape
                and other.layout.is_contiguous(other.shape)
                and latest[other] < total.attrs["number"]
            ):
                found[node] = total.attrs["number"], at
    return found


def sums_by_library(graph: Graph, least: int) -> Graph:
    """A graph whose sums of at least so many bytes say `library`, where all devices have a part."""

    def told(node: Tensor, *part: Tensor) -> Tensor:
        whole = len(node.attrs["holders"]) == node.attrs["devices"] > 1
        attrs = {"library": True} if whole and node.nbytes >= least else {}
        return node.with_(inputs=part, attrs={**node.attrs, **attrs})

    return rewrite(graph, {all_sum: told})


def gather_for_products(graphs: Sequence[Graph]) -> list[Graph]:
    """Graphs of several devices whose gathers say so (`weights`: of which type) where all that
    takes a result are products, so that it can be packed before it is gathered.
    """
    types: dict[int, set[DType | None]] = {}
    for graph in graphs:
        for node in filter(all_gather.made, graph.nodes):
            fits = node.attrs["axis"] == node.ndim - 1 and node not in graph.outputs
            of = types.setdefault(node.attrs["number"], set() if fits else {None})
            for user in graph.users[node]:
                if not both.made(user):
                    taken = matmul.made(user) and user.inputs[0] is node
                    of.add(user.inputs[1].dtype if taken else None)

    def told(node: Tensor, *part: Tensor) -> Tensor:
        (weights, *more) = types[node.attrs["number"]] or {None}
        attrs = {"weights": weights} if weights and not more else {}
        return node.with_(inputs=part, attrs={**node.attrs, **attrs})

    return [rewrite(graph, {all_gather: told}) for graph in graphs]


def write_gathered(graph: Graph, options: Options) -> Graph:
    """Gathers of products of which a device has one stretch (from `start`): they are written there
    at once.
    """

    def straight(node: Tensor, *part: Tensor) -> Tensor:
        runs, device = node.attrs["runs"], node.attrs["device"]
        own = [n for n, (owners, _) in enumerate(runs) if device in owners]
        ready = part and linear.made(part[0]) and only_user(graph, node.inputs[0])
        one = node.attrs["repeat"] == len(own) == 1 and runs[own[0]][0] == (device,)
        if not (ready and one and node.attrs["axis"] == node.ndim - 1):
            return node.with_(inputs=part)
        start = sum(n for _, n in runs[: own[0]])
        return node.with_(inputs=part, attrs={**node.attrs, "start": start})

    return rewrite(graph, {all_gather: straight})
