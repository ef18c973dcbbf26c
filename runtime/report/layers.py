"""The layers of a placement: what each computes and how it is split, those alike as one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from runtime.backends.meta.planner import PageBytes, StagePlan
from runtime.ops.graph import Graph
from runtime.ops.registry import Kind, kind_of
from runtime.ops.splits import MIRRORED, Routed, Split, State
from runtime.ops.tensor import LEAVES, Tensor
from runtime.planning import Placement

_NUMBER = re.compile(r"(?:blk|cache|state)\.(\d+)\.")
_AXES = {  # of weights by how many they have, and of memory by its storage
    1: ("elements",),
    2: ("rows", "columns"),
    3: ("experts", "rows", "columns"),
    "k": ("pages", "tokens", "heads", "dims"),
    "v": ("pages", "tokens", "heads", "dims"),
    ("slots", 3): ("slots", "taps", "channels"),
    ("slots", 4): ("slots", "heads", "rows", "columns"),
}


class Part(NamedTuple):
    """Something a node reads: a "weight", a "page" or "slot" of memory; or its "result".

    nbytes, most: of the whole, in the layer where it is smallest and where it is largest. axis:
    along which it is split; sizes: what each device has; () where nothing is split. shared:
    whether several devices have the same of it. why: of a weight that is mirrored, or of experts
    that stay whole, the reason. others: sizes of other layers, where they are not these.
    """

    what: str
    name: str
    dtype: str
    nbytes: float
    most: float
    axis: str = ""
    sizes: tuple[int, ...] = ()
    shared: bool = False
    why: str = ""
    others: tuple[tuple[int, ...], ...] = ()


class Row(NamedTuple):
    """A node: its op, what it reads that stays, how its result lies, and what is exchanged.

    node: of the first of the layers.
    """

    node: Tensor
    op: str
    name: str
    result: Part
    reads: tuple[Part, ...]
    exchange: str = ""
    nbytes: int = 0


class Layers(NamedTuple):
    """Layers alike, by number (none: before or behind all layers), of one stage.

    weights: bytes of those of all of them.
    """

    stage: int
    name: str
    numbers: tuple[int, ...]
    rows: tuple[Row, ...]
    weights: float

    @property
    def title(self) -> str:
        """Such as "layers 0-2, 4-6, 8-10 and more: 48 alike"."""
        if not self.numbers:
            return self.name
        shown = spans(self.numbers)
        kind = "layer" if len(self.numbers) == 1 else "layers"
        alike = f": {len(self.numbers)} alike" if len(self.numbers) > 1 else ""
        return f"{kind} {shown}{alike}"


def spans(numbers: Sequence[int], most: int = 3) -> str:
    """Numbers as ranges: "0-2, 4-6, 8"."""
    found: list[list[int]] = []
    for n in numbers:
        if found and found[-1][1] == n - 1:
            found[-1][1] = n
        else:
            found.append([n, n])
    texts = [f"{a}" if a == b else f"{a}-{b}" for a, b in found]
    return ", ".join(texts[:most]) + (" and so on" if len(texts) > most else "")


def layers_of(placement: Placement) -> list[Layers]:
    """All layers in order of their first one; alike are those of equal ops and splits.

    What each device has may differ between them: of heads that do not come out even.
    """
    found: dict[object, Layers] = {}
    for stage, plan in enumerate(placement.plans):
        for name, number, rows in _blocks(plan, placement.page_nbytes):
            numbers = () if number is None else (number,)
            this = Layers(stage, name, numbers, tuple(rows), _weights(rows))
            key = (stage, name, *map(_alike, rows))
            found[key] = _both(found[key], this) if key in found else this
    return list(found.values())


def _weights(rows: Sequence[Row]) -> float:
    parts = {part.name: part.nbytes for row in rows for part in row.reads if part.what == "weight"}
    return sum(parts.values())


def _alike(row: Row) -> object:
    parts = [(p.what, p.name, p.axis, p.shared) for p in (row.result, *row.reads)]
    return row.op, row.name, row.exchange, row.nbytes, *parts


def _both(a: Layers, b: Layers) -> Layers:
    rows = tuple(
        x._replace(result=_joined(x.result, y.result), reads=tuple(map(_joined, x.reads, y.reads)))
        for x, y in zip(a.rows, b.rows, strict=True)
    )
    return a._replace(numbers=a.numbers + b.numbers, rows=rows, weights=a.weights + b.weights)


def _joined(a: Part, b: Part) -> Part:
    kinds = "/".join(dict.fromkeys([*a.dtype.split("/"), b.dtype]))
    sizes = tuple(dict.fromkeys([a.sizes, *a.others, b.sizes]))
    return a._replace(
        dtype=kinds, nbytes=min(a.nbytes, b.nbytes), most=max(a.most, b.most), others=sizes[1:]
    )


def _blocks(plan: StagePlan, page_nbytes: PageBytes) -> Iterator[tuple[str, int | None, list[Row]]]:
    """(name, number, rows) of each layer, and of what is before and behind them."""
    at = _layer_numbers(plan.graph)
    exchanged = {e.tensor: "gather" if e.gathered else "sum" for e in plan.exchanges}
    order: dict[int | None, list[Row]] = {}
    seen: list[int | None] = []
    for node in plan.graph.nodes:
        if kind_of(node) in (Kind.LEAF, Kind.VIEW) and node not in exchanged:
            continue
        if at[node] not in seen:
            seen.append(at[node])
        order.setdefault(at[node], []).append(
            _row(plan, page_nbytes, node, exchanged.get(node, ""))
        )
    for place in seen:
        name = {-1: "before the layers", None: "output"}.get(place, "")
        yield name, None if place in (-1, None) else place, order[place]


def _layer_numbers(graph: Graph) -> dict[Tensor, int | None]:
    """The layer of each node: -1 before the first, None behind the last.

    By its name or that of its weights and memory; what has neither is of the layer around it.
    """
    own = [
        max([_number(x), *(_number(w) for w in x.inputs if w.op in LEAVES)]) for x in graph.nodes
    ]
    last = max((n for n, number in enumerate(own) if number >= 0), default=-1)
    made: set[Tensor] = set()  # of step inputs and constants alone
    found: dict[Tensor, int | None] = {}
    here = -1
    for n, node in enumerate(graph.nodes):
        here = max(here, own[n])
        if node.op in ("input", "constant") or (node.inputs and made.issuperset(node.inputs)):
            made.add(node)
        found[node] = -1 if node in made else here if n <= last else None
    return found


def _number(x: Tensor) -> int:
    match = _NUMBER.match(x.name)
    return int(match[1]) if match else -1


def _row(plan: StagePlan, page_nbytes: PageBytes, node: Tensor, exchange: str) -> Row:
    reads = [
        _part(
            plan,
            _what(x.base),
            x.base,
            plan.use(node, n) if x is x.base else plan.state(x.base),
            page_nbytes(x.base) if x.base.op == "state" else x.base.nbytes,
        )
        for n, x in enumerate(node.inputs)
        if x.base.op in ("weight", "state")
    ]
    result = _part(plan, "result", node, plan.state(node), node.nbytes)
    return Row(
        node,
        node.op,
        _short(node.name),
        result,
        tuple(reads),
        exchange,
        node.nbytes if exchange else 0,
    )


def _what(leaf: Tensor) -> str:
    if leaf.op == "weight":
        return "weight"
    return "slot" if leaf.attrs["storage"] == "slots" else "page"


def _part(plan: StagePlan, what: str, x: Tensor, state: State, nbytes: float) -> Part:
    why = plan.layout.why.get(x, "") if plan.layout else ""
    plain = Part(what, _short(x.name), x.dtype.name, nbytes, nbytes, why=why)
    if not isinstance(state, Split):
        routed = "by expert" if isinstance(state, Routed) else "partial"
        return plain._replace(axis="" if state is MIRRORED else routed)
    storage = x.attrs.get("storage", x.ndim)
    names = _AXES.get((storage, x.ndim), _AXES.get(storage)) if x.op in ("weight", "state") else ()
    axis = names[state.axis] if names else f"axis {state.axis}"
    sizes = tuple(state.local(d) for d in range(len(plan.devices)))
    return plain._replace(axis=axis, sizes=sizes, shared=sum(sizes) > int(x.shape[state.axis]))


def _short(name: str) -> str:
    """Without the number of its layer."""
    return _NUMBER.sub("", name).removesuffix(".weight")
