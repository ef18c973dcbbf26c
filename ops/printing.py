"""A graph as text: one line per node, numbered, inputs by number, leaves by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from runtime.ops.tensor import LEAVES, Tensor

if TYPE_CHECKING:
    from runtime.ops.graph import Graph


def render(graph: Graph) -> str:
    """The readable form of a graph: `%12 = matmul(%11, blk.0.attn_q.weight) f32[tokens:8, 64]`."""
    numbers: dict[Tensor, str] = {}
    lines = [f"{graph.name}: {sum(n.op not in LEAVES for n in graph.nodes)} ops"]

    for node in graph.nodes:
        if node.op in LEAVES:
            numbers[node] = node.name
            continue
        numbers[node] = f"%{len(lines)}"
        arguments = [numbers[x] for x in node.inputs] + attributes(node.attrs)
        label = f"  # {node.name}" if node.name else ""
        shape = ", ".join(map(repr, node.shape))
        lines.append(
            f"{numbers[node]:>5} = {node.op}({', '.join(arguments)}) "
            f"{node.dtype.name}[{shape}]{label}"
        )
    lines.append("return " + ", ".join(numbers[o] for o in graph.outputs))
    return "\n".join(lines)


def attributes(attrs: Mapping[str, Any]) -> list[str]:
    """Attributes as `name=value`, floats short, defaults of None left out."""
    return [
        f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}"
        for k, v in attrs.items()
        if v is not None
    ]
