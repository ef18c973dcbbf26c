"""Sums over devices fused with the residuals that are added to them."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.backends.passes.packing import node_of, only_user
from runtime.ops.collective import all_sum
from runtime.ops.elementwise import add
from runtime.ops.graph import Graph, rewrite
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
