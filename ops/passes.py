"""Passes over plain graphs that every device profits from."""

from __future__ import annotations

from types import MappingProxyType

from runtime.ops.graph import Graph
from runtime.ops.rows import select_rows
from runtime.ops.tensor import Dim, Tensor

# Ops whose result for one row depends on that row of their inputs alone.
ROWWISE = frozenset({
    "add", "mul", "scale", "silu", "sigmoid", "rms_norm", "matmul", "matmul_id", "softmax", "top_k",
    "take", "normalize", "expert_sum", "expert_bias", "swiglu_oai", "l2_norm", "softplus",
    "row_scale",
})  # fmt: skip
_ROW_VIEWS = ("reshape", "slice")  # of what lies behind the first axis


def select_early(graph: Graph) -> Graph:
    """Pick the wanted rows as early as possible, so that the rest is computed for them alone.

    A `select_rows` near the outputs moves up through ops that work row by row, up to values that
    something else needs in full. In a prompt this spares the last layer's feed-forward part.
    """
    for node in graph.nodes:
        if node.op == "select_rows" and isinstance(node.shape[0], Dim):
            graph = _move_up(graph, node)
    return graph


def _move_up(graph: Graph, select: Tensor) -> Graph:
    source, ids = select.inputs
    cone: set[Tensor] = set()
    for node in reversed(graph.nodes):
        inside = all(user in cone or user is select for user in graph.users[node])
        if (
            (node.op in ROWWISE or _view_of_rows(node))
            and inside
            and graph.users[node]
            and _per_row(node, source)
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
            attrs = node.attrs if node.op != "reshape" else MappingProxyType({"shape": shape})
            inputs = tuple(map(chosen, node.inputs))
            made[node] = Tensor(node.op, inputs, shape, node.dtype, attrs, node.name)
    return _replace(graph, select, made[source])


def _view_of_rows(node: Tensor) -> bool:
    """Whether a view takes each row of its input as it is, or a part of each."""
    if node.op not in _ROW_VIEWS or node.attrs.get("axis", 1) % max(1, node.ndim) == 0:
        return False
    return _per_row(node, node.inputs[0]) and node.shape[0] == node.inputs[0].shape[0]


def _per_row(x: Tensor, source: Tensor) -> bool:
    """Whether x has a row for each row of `source`."""
    first, want = (t.shape[0] if t.shape else None for t in (x, source))
    return isinstance(first, Dim) and isinstance(want, Dim) and first.name == want.name


def _replace(graph: Graph, old: Tensor, new: Tensor) -> Graph:
    made: dict[Tensor, Tensor] = {old: new}
    for node in graph.nodes:
        if node not in made and any(x in made for x in node.inputs):
            inputs = tuple(made.get(x, x) for x in node.inputs)
            attrs = MappingProxyType(dict(node.attrs))
            made[node] = Tensor(node.op, inputs, node.shape, node.dtype, attrs, node.name)
    return Graph(tuple(made.get(o, o) for o in graph.outputs), graph.name)
