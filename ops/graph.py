"""Graph: the nodes behind some outputs in a fixed order, and the one walker over them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from runtime.ops.cached import cached_property
from runtime.ops.cost import Cost, Seen, cost
from runtime.ops.errors import OpError
from runtime.ops.printing import render
from runtime.ops.tensor import LEAVES, Tensor

T = TypeVar("T")
Rule = Callable[..., Any]
Rules = Mapping[Any, Rule]  # by `Op`, or by name, as leaves have no other


@dataclass(frozen=True)
class Graph:
    """What a step computes: `outputs` are kept, state writes among them have effects."""

    outputs: tuple[Tensor, ...]
    name: str = "graph"

    @cached_property
    def nodes(self) -> tuple[Tensor, ...]:
        """All nodes, every one after its inputs; stable for equal construction."""
        return _depth_first(self.outputs)

    @cached_property
    def users(self) -> dict[Tensor, list[Tensor]]:
        """Node -> the nodes that read it, in order."""
        users: dict[Tensor, list[Tensor]] = {node: [] for node in self.nodes}
        for node in self.nodes:
            for x in dict.fromkeys(node.inputs):
                users[x].append(node)
        return users

    def leaves(self, kind: str) -> list[Tensor]:
        """The leaves of one kind: "input", "weight", "constant" or "state"."""
        return [node for node in self.nodes if node.op == kind]

    def key(self) -> str:
        """A digest of everything that decides the compiled program; never object addresses."""
        return self._key

    @cached_property
    def _key(self) -> str:
        lines = [f"{n} {line}" for n, line in enumerate(walk(self, default=_key_line))]
        numbers = {node: n for n, node in enumerate(self.nodes)}
        tail = " ".join(str(numbers[o]) for o in self.outputs)
        return hashlib.sha256("\n".join([*lines, tail]).encode()).hexdigest()

    def cost(self, seen: Seen | None = None) -> Cost:
        """Bytes and FLOPs of a step, by default one at full capacity."""
        return sum((cost(node, seen or Seen()) for node in self.nodes), Cost(0, 0))

    def __str__(self) -> str:
        return render(self)


def _depth_first(outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    seen, found = set[Tensor](), list[Tensor]()
    stack: list[Tensor | None] = [*reversed(outputs)]  # None: what is below has its inputs
    while stack:
        node = stack.pop()
        if node is None:
            found.append(stack.pop())  # type: ignore[arg-type]
        elif node not in seen:
            seen.add(node)
            if node.inputs:
                stack += (node, None)
                stack += [x for x in reversed(node.inputs) if x not in seen]
            else:
                found.append(node)
    return tuple(found)


def walk(graph: Graph, rules: Rules | None = None, default: Rule | None = None) -> list[Any]:
    """Call the rule of each node's op as `rule(node, *values of its inputs)`, in order; the values.

    Shapes, reference execution, rewriting, cost and printing are all rule tables for this walk.
    An op that is in no table and has no default is an OpError that names it.
    """
    values: dict[Tensor, Any] = {}
    rules = _named(rules or {})
    for node in graph.nodes:
        rule = rules.get(node.op, default)
        if rule is None:
            raise OpError(f"no rule for op {node.op!r} ({node.name or 'unnamed'})")
        values[node] = rule(node, *[values[x] for x in node.inputs])
    return list(values.values())


def _named(rules: Rules) -> dict[str, Rule]:
    return {key if isinstance(key, str) else key.name: rule for key, rule in rules.items()}


def rewrite(graph: Graph, rules: Rules) -> Graph:
    """The graph with nodes replaced by what `rules` return; other nodes follow their inputs."""

    rules, new = _named(rules), dict[Tensor, Tensor]()
    if not any(node.op in rules for node in graph.nodes):
        return graph
    for node in graph.nodes:
        inputs = tuple([new[x] for x in node.inputs])
        if rule := rules.get(node.op):
            new[node] = rule(node, *inputs)
        else:  # tensors are equal only to themselves
            new[node] = node if inputs == node.inputs else node.with_(inputs=inputs)
    outputs = tuple(new[o] for o in graph.outputs)
    return graph if outputs == graph.outputs else Graph(outputs, graph.name)


def _key_line(node: Tensor, *inputs: str) -> str:
    attrs = {k: _digest(v) for k, v in sorted(node.attrs.items())}
    shape = [repr(n) for n in node.shape]
    name = node.name if node.op in LEAVES else ""
    parents = hashlib.sha256("|".join(inputs).encode()).hexdigest() if inputs else ""
    return f"{node.op} {name} {shape} {node.dtype.name} {attrs} {parents}"


def _digest(value: Any) -> str:
    if hasattr(value, "tobytes"):
        return hashlib.sha256(value.tobytes()).hexdigest()
    return repr(value)
