"""A placement as a graph for Graphviz: `dot -Tsvg`."""

from __future__ import annotations

from runtime.ops.registry import Kind, kind_of
from runtime.ops.splits import Split
from runtime.ops.tensor import Tensor
from runtime.planning import Placement


def dot(placement: Placement) -> str:
    """The graph of a token, stage by stage; split results and exchanges are marked."""
    lines = ["digraph plan {", '  node [shape=box, style=filled, fontname="Helvetica"];']
    for stage, plan in enumerate(placement.plans):
        lines.append(f'  subgraph cluster_{stage} {{ label="{plan.stage}";')
        names = {node: f"n{stage}_{n}" for n, node in enumerate(plan.graph.nodes)}
        exchanged = {x.tensor: "gather" if x.gathered else "sum" for x in plan.exchanges}
        for node, name in names.items():
            if kind_of(node) in (Kind.LEAF, Kind.VIEW) and node not in exchanged:
                continue
            state = plan.state(node)
            fill = "#cfe2f3" if isinstance(state, Split) else "#f4f4f4"
            label = f"{node.name or node.op}\\n{state}" + (
                f"\\n{exchanged[node]}" if node in exchanged else ""
            )
            edge = ', color="#c4262e", penwidth=2' if node in exchanged else ""
            lines.append(f'    {name} [label="{label}", fillcolor="{fill}"{edge}];')
            lines += [f"    {names[x]} -> {name};" for x in _inputs(node)]
        lines.append("  }")
    return "\n".join([*lines, "}", ""])


def _inputs(node: Tensor) -> list[Tensor]:
    """Computed nodes that it reads, through views."""
    bases = dict.fromkeys(x.base for x in node.inputs)
    return [x for x in bases if kind_of(x) is not Kind.LEAF]
