"""Passes over plain graphs that every device profits from."""

from __future__ import annotations

from runtime.ops.graph import Graph
from runtime.ops.registry import Kind, kind_of
from runtime.ops.rows import select_rows
from runtime.ops.tensor import Dim, Tensor


def select_early(graph: Graph) -> Graph:
    """Pick the wanted rows as early as possible, so that the rest is computed for them alone.

    A `select_rows` near the outputs moves up through ops that work row by row, up to values that
    something else needs in full. In a prompt this spares the last layer's feed-forward part.
    """
    for node in graph.nodes:
        if select_rows.made(node) and isinstance(node.shape[0], Dim):
            graph = _move_up(graph, node)
    return graph


def _move_up(graph: Graph, select: Tensor) -> Graph:
    source, ids = select.inputs
    cone: set[Tensor] = set()
    for node in reversed(graph.nodes):
        inside = all(user in cone or user is select for user in graph.users[node])
        if (
            inside
            and graph.users[node]
            and _per_row(node, source)
            and _by_row(node)
            and all(x.ndim > 1 for x in node.inputs if _per_row(x, source))
        ):
            cone.add(node)
    if source not in cone:
        return graph
    made: dict[Tensor, Tensor] = {}

    def chosen(x: Tensor) -> Tensor:
        if not _per_row(x, source):
            return x
        if x not in made:
            made[x] = select_rows(x, ids)
        return made[x]

    for node in graph.nodes:  # inputs before those that use them
        if node in cone:
            shape = (select.shape[0], *node.shape[1:])
            attrs = {**node.attrs, "shape": shape} if "shape" in node.attrs else node.attrs
            inputs = tuple(map(chosen, node.inputs))
            made[node] = node.with_(inputs=inputs, shape=shape, attrs=attrs)
    return _replace(graph, select, made[source])


def _by_row(node: Tensor) -> bool:
    """Whether each row follows from the same row of the inputs; of a view: is it, or a part."""
    kind = kind_of(node)
    if kind is not Kind.VIEW:
        return kind.by_row
    x = node.inputs[0]
    return node.attrs.get("axis", 1) % node.ndim != 0 and x.shape[:1] == node.shape[:1]


def _per_row(x: Tensor, source: Tensor) -> bool:
    """Whether x has a row for each row of `source`."""
    first, want = (t.shape[0] if t.shape else None for t in (x, source))
    return isinstance(first, Dim) and isinstance(want, Dim) and first.name == want.name


def _replace(graph: Graph, old: Tensor, new: Tensor) -> Graph:
    made: dict[Tensor, Tensor] = {old: new}
    for node in graph.nodes:
        if node not in made and any(x in made for x in node.inputs):
            made[node] = node.with_(inputs=tuple(made.get(x, x) for x in node.inputs))
    return Graph(tuple(made.get(o, o) for o in graph.outputs), graph.name)
