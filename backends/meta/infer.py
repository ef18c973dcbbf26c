"""Which tensors are split over devices, and how: inferred from a graph alone.

A product with a weight can be summed from parts wherever its input is computed in parts: an ANCHOR.
From its input the split runs backwards, through views, norms of what stays together, attention and
projections, to weights and caches, and sideways to whatever else takes part; all of that is the
anchor's REGION. The smallest parts that can be told apart there (heads, groups of heads that share
a K head, blocks of a quantised weight, units of a gated product) are found by following every unit
of the axis through the region and joining those that an op keeps together. They are dealt out by
bytes of weights. Where the experts of a mixture have too few parts inside, whole experts are parts.
What is left over is mirrored, which is always right.

An EXACT layout has the bits of one device, since it cuts no sum: an anchor's input is gathered, and
its result is split by rows of its weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from operator import or_

import numpy as np

from runtime.backends.meta.region import Region
from runtime.ops.axes import OUT, carried, is_summed, links, needs, result, routed, summands
from runtime.ops.graph import Graph
from runtime.ops.registry import Kind, find, kind_of
from runtime.ops.splits import (
    MIRRORED,
    PARTIAL,
    Routed,
    Split,
    State,
    Unsplittable,
    normal,
    split_of,
)
from runtime.ops.tensor import LEAVES, Tensor

FOLLOWS = "its input is not computed in parts"  # which something else is the reason of
_UNIT = 32  # elements of an axis that stay together where there are plenty
_FEW = 8  # parts a device, at least, for that
Found = tuple[Sequence[State], State]  # how a node takes its inputs, and what it is then


@dataclass(frozen=True)
class Layout:
    """How each tensor of a graph lies on `devices` devices.

    states: as computed, PARTIAL before it is summed; a weight that some uses cut is MIRRORED.
    uses: of each node the states in which it takes its inputs. holders: the devices that compute
    it, as bits. whole: what is summed or gathered, and its number in order. why: of weights that
    are mirrored, or of which experts stay whole, the reason.
    """

    graph: Graph
    devices: int
    states: Mapping[Tensor, State]
    uses: Mapping[Tensor, tuple[State, ...]]
    holders: Mapping[Tensor, int]
    whole: Mapping[Tensor, int]
    why: Mapping[Tensor, str]

    def kept(self, output: Tensor) -> State:
        """How an output is kept: whole, but for memory that is written."""
        return self.states[output] if output.base.op == "state" else MIRRORED

    @property
    def sums(self) -> list[Tensor]:
        """What is summed, in order."""
        return [x for x in self.whole if self.states[x] is PARTIAL]

    @property
    def gathers(self) -> list[Tensor]:
        """What is gathered, in order."""
        return [x for x in self.whole if self.states[x] is not PARTIAL]


def infer(
    graph: Graph, shares: Sequence[float], across: bool | None = None, exact: bool = False,
    grain: int = 1,
) -> Layout:  # fmt: skip
    """The layout over len(shares) devices; shares are above 0, of the weights' bytes.

    across: whether experts stay whole, on one device each; None: where their insides are coarse.
    exact: no sum is cut, for the bits of one device; then experts are split inside. grain: elements
    of an axis that stay together where it can be divided so.
    """
    refused: dict[Tensor, str] = {}
    across = False if exact else across
    while True:
        wanted = shares if len(shares) > 1 else ()
        regions = _regions(graph, wanted, refused, across, exact, grain) if wanted else []
        try:
            inside = _beside(graph, regions, shares)
            rows = inside if exact else None
            dealt = _dealt(regions, inside)
            layout = _layout(graph, len(shares), dealt, regions, refused, rows, grain)
        except Unsplittable:  # what experts make is wanted as it is
            if across is False:
                raise
            return infer(graph, shares, False, grain=grain)
        if not (scattered := _scattered(layout, regions)):
            return layout
        refused |= scattered


def _regions(
    graph: Graph, shares: Sequence[float], refused: dict[Tensor, str], across: bool | None,
    exact: bool, grain: int,
) -> list[Region]:  # fmt: skip
    """The regions of all anchors that are worth it, in the order of the anchors."""
    found, taken = list[Region](), set[Tensor]()
    for node in graph.nodes:
        region = None
        for start, axis in () if node in refused else _starts(graph, node):
            try:
                region = _grown(graph, node, start, axis, len(shares), taken, exact, grain)
                refused.pop(node, None)
                break
            except Unsplittable as reason:
                refused.setdefault(node, str(reason))
        experts = None if across is False else _experts(graph, node)
        if experts and not taken & experts.labels.keys():
            experts.why = _why_whole(region, shares, int(node.shape[1]), bool(across))
            region = experts if experts.why else region
        if region is not None:
            found.append(region)
            taken |= region.labels.keys() - region.whole
    return found


def _experts(graph: Graph, node: Tensor) -> Region | None:
    """All weights of the experts of which a node is the last product, an atom for each expert."""
    for number, by in find(node.op).picks.items() if kind_of(node) is Kind.CONTRACTION else ():
        users = [user for user in graph.users[node.inputs[by]] if find(user.op).picks]
        if node is [user for user in users if kind_of(user) is Kind.CONTRACTION][-1]:
            region = Region(graph, node, int(node.inputs[number].shape[0]), False)
            for user in users:
                for at in find(user.op).picks:
                    region.labels[user.inputs[at]] = 0, np.arange(len(region.root))[:, None]
                    region.summed[user] = at, user.inputs[at]
            return region
    return None


def _why_whole(inside: Region | None, shares: Sequence[float], used: int, asked: bool) -> str:
    """Why experts are better whole than split as in `inside`; empty: they are not.

    A token does not use experts of all devices evenly. What the least device has of them is off by
    about a standard deviation with one token, and by nothing with very many: we count with half.
    """
    if inside is None or asked:
        return "whole experts: " + ("as asked" if asked else "there are no parts inside")
    (bits,), costs, each = _dealt([inside], shares), inside.nbytes, np.divide(shares, sum(shares))
    late = max(costs[bits == 1 << d].sum() / n / costs.sum() for d, n in enumerate(each) if n)
    if late <= 1 + 0.5 * np.sqrt((1 / each[each > 0].min() - 1) / used):
        return ""
    return f"whole experts: of {len(inside.classes())} parts a device has {late:.2f} of its share"


def _starts(graph: Graph, node: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Axes that a region may begin with: what a node sums over, and rows of what is wanted."""
    if not any(x.op == "weight" for x in node.inputs):
        return
    for number, x in enumerate(node.inputs):
        for axis in range(x.ndim):
            if x.op not in LEAVES and is_summed(node, number, axis):
                yield x, axis
    if node in graph.outputs:
        yield node, node.ndim - 1


def _grown(
    graph: Graph, node: Tensor, start: Tensor, axis: int, devices: int, taken: set[Tensor],
    exact: bool, grain: int,
) -> Region:  # fmt: skip
    """Groups stay together where there are enough of them for all devices.

    Unsplittable unless it splits work that no other region has.
    """
    n = int(start.shape[axis])
    cut = start is not node and not exact
    unit = max(x.dtype.block for x in node.inputs if x.op == "weight") if cut else 1
    unit = unit if n % unit == 0 else n
    if unit == 1:
        unit = _unit(n, devices, grain)
    for coarse in (True, False):
        region = Region(graph, node, n // unit, coarse, exact)
        region.grow(start, axis, np.arange(n) // unit)
        if len(region.classes()) >= devices:
            break
    if taken & (region.labels.keys() - region.whole):
        raise Unsplittable("what it would split is split otherwise")
    if node not in region.labels and {w for w, _ in region.weights()} <= {*node.inputs}:
        raise Unsplittable(FOLLOWS)
    if len(region.classes()) < 2:
        raise Unsplittable("it has no parts that could be told apart")
    return region


def _unit(n: int, devices: int, grain: int) -> int:
    if n % _UNIT == 0 and n // _UNIT >= _FEW * devices:
        return _UNIT
    return grain if n % grain == 0 else 1


def _beside(graph: Graph, regions: Sequence[Region], shares: Sequence[float]) -> list[float]:
    """The shares of what is split that make these of all bytes, with what everybody has.

    Not less than half of what was asked for: of a small model everybody has a lot.
    """
    split = sum(region.nbytes.sum() for region in regions)
    cut = {x for region in regions for x, _ in region.weights()}
    cut -= {x for x in cut if any(kind_of(user) is Kind.GATHER for user in graph.users[x])}
    mirrored = sum(x.nbytes for x in graph.leaves("weight") if x not in cut)
    total = split + len(shares) * mirrored
    each = [share / sum(shares) for share in shares]
    return [max(n * total - mirrored, n * split / 2) or n for n in each]


def _dealt(regions: Sequence[Region], shares: Sequence[float]) -> list[np.ndarray]:
    """int64 [atoms] for each region: its devices as bits.

    What a device got too much of in one region it gets less of in the next.
    """
    ends = np.array(list(accumulate(shares))) / sum(shares)
    given, total, found = np.zeros(len(shares)), 0.0, []
    for region in regions:
        costs = region.nbytes
        classes, groups = region.classes(), region.groups()
        total += costs.sum()
        if 0 < len(groups) < len(shares):
            owner = _by_group(groups, costs, ends, given, total)
        else:
            owner = _in_order(classes, costs, ends * total - given)
        atoms, devices = np.array([*owner.keys()]), np.array([*owner.values()])
        for device in range(len(shares)):
            given[device] = np.append(given[device], costs[atoms[devices <= device]]).cumsum()[-1]
        bits = np.zeros(len(region.root), np.int64)
        bits[atoms] = 1 << devices
        found.append(bits[region.root])
    return found


def _in_order(classes: Sequence[int], costs: np.ndarray, ends: np.ndarray) -> dict[int, int]:
    """Stretches of parts, one for each device; `ends`: where they should end, in bytes."""
    sums = np.append(0, np.cumsum(costs[list(classes)]))
    cuts = list(accumulate((int(np.argmin(np.abs(sums - end))) for end in ends), max))
    cuts[-1] = len(classes)
    owners = np.searchsorted(cuts, np.arange(len(classes)), side="right")
    return dict(zip(classes, owners.tolist(), strict=True))


def _by_group(
    groups: Sequence[list[int]], costs: np.ndarray, ends: np.ndarray, given: np.ndarray,
    total: float,
) -> dict[int, int]:  # fmt: skip
    """Several devices to a group: parts of one group, and of no other, for each of them."""
    starts = np.append(0, ends[:-1])
    home = np.minimum(((starts + ends) / 2 * len(groups)).astype(int), len(groups) - 1)
    if len({*home.tolist()}) < len(groups):
        firsts, sums = [group[0] for group in groups], np.zeros_like(costs)
        sums[firsts] = [costs[group].sum() for group in groups]
        owner = _in_order(firsts, sums, ends * total - given)
        return {atom: owner[group[0]] for group in groups for atom in group}
    found: dict[int, int] = {}
    for number, group in enumerate(groups):
        devices = np.flatnonzero(home == number)
        widths = np.cumsum((ends - starts)[devices])
        inner = _in_order(group, costs, widths / widths[-1] * costs[group].sum())
        found |= {atom: int(devices[n]) for atom, n in inner.items()}
    return found


def _layout(
    graph: Graph, devices: int, dealt: Sequence[np.ndarray], regions: Sequence[Region],
    refused: dict[Tensor, str], rows: Sequence[float] | None, grain: int,
) -> Layout:  # fmt: skip
    """rows: shares of the results of products that would be sums of parts, which none then is."""
    everybody = (1 << devices) - 1
    splits: dict[Tensor, Split] = {}
    summed: dict[Tensor, tuple[int, Split]] = {}
    for region, bits in zip(regions, dealt, strict=True):
        owners = np.append(bits, 0)
        own = {
            tensor: split_of(axis, np.bitwise_or.reduce(owners[atoms], 1))
            for tensor, (axis, atoms) in region.labels.items()
        }
        fixed = {x for x in own if x.op in ("weight", "constant")} | region.whole
        made = {x: split for x, split in own.items() if x not in fixed}
        try:
            for x in (x for x in made if x.op not in LEAVES):
                needs(x, made[x])
        except Unsplittable as reason:  # dealt out so it cannot be computed; it stays whole
            refused[region.anchor] = str(reason)
            continue
        splits |= made
        if rows is None:
            summed |= {node: (number, own[x]) for node, (number, x) in region.summed.items()}
        else:
            splits |= {node: _rows_of(node, rows, grain) for node in region.summed}
    whole: set[Tensor] = set()  # what is summed or gathered for somebody
    while True:
        found = _Pass(graph, everybody, splits, summed, whole, rows is not None)
        if found.whole == whole:
            break
        whole = found.whole
    return Layout(
        graph, devices, found.states, found.uses, found.holders,
        {x: number for number, x in enumerate(x for x in graph.nodes if x in whole)},
        _reasons(graph, found.uses, refused, regions),
    )  # fmt: skip


def _rows_of(node: Tensor, shares: Sequence[float], grain: int) -> Split:
    """A product's result along its last axis, of rows of the weight, a stretch for each device."""
    n = int(node.shape[-1])
    unit = _unit(n, len(shares), grain)
    ends = [round(end / sum(shares) * n / unit) * unit for end in accumulate(shares)]
    pairs = zip(ends, [0, *ends], strict=False)
    return normal(node.ndim - 1, [((d,), end - start) for d, (end, start) in enumerate(pairs)])


class _Pass:
    """States of all nodes in order, and the inputs that have to be made whole for it.

    whole: of those of a pass before, everybody takes them whole.
    """

    def __init__(
        self, graph: Graph, everybody: int, splits: Mapping[Tensor, Split],
        summed: Mapping[Tensor, tuple[int, Split]], whole: set[Tensor],
        exact: bool,
    ) -> None:  # fmt: skip
        self.states: dict[Tensor, State] = {}
        self.uses: dict[Tensor, tuple[State, ...]] = {}
        self.holders: dict[Tensor, int] = {}
        self.whole, self._exact = {*whole}, exact
        for node in graph.nodes:
            if node in summed:
                uses, state = self._summed(node, *summed[node])
            elif node in splits:
                uses, state = self._parts(node, splits[node])
            else:
                uses, state = self._taken(node)
            self.uses[node], self.states[node] = tuple(uses), state
            for x, use in zip(node.inputs, uses, strict=True):
                if self.states[x] not in (MIRRORED, use):
                    self.whole.add(x)
            self.holders[node] = self._holders(node, state, everybody)
        self.whole |= {*graph.outputs}
        self.whole = {
            x for x in self.whole if self.states[x] is not MIRRORED and x.base.op != "state"
        }
        if any(isinstance(self.states[x], Routed) for x in self.whole):
            raise Unsplittable("rows by expert cannot be gathered")

    def _rows(self, node: Tensor) -> list[State]:
        """Inputs of which devices have rows by expert as they come, all others whole."""
        found = [self.states[x] for x in node.inputs]
        return [state if isinstance(state, Routed) else MIRRORED for state in found]

    def _summed(self, node: Tensor, number: int, split: Split) -> Found:
        """The states of the inputs where one is split along an axis that the result lacks."""
        if number not in find(node.op).picks:
            return summands(node, number, split), PARTIAL
        uses = self._rows(node)
        uses[number] = split
        return uses, routed(node, uses)

    def _parts(self, node: Tensor, split: Split) -> Found:
        """The states of inputs from which a node is computed in parts."""
        if node.op in LEAVES:
            return [], split
        if find(node.op).kind is Kind.VIEW:  # a slice is of what its other half is of
            given = [self.states[x] for x in node.inputs]
            with contextlib.suppress(Unsplittable):
                if result(node, given) == split:
                    return given, split
        return needs(node, split), split

    def _taken(self, node: Tensor) -> Found:
        """As the inputs come, if the op can; else it takes them whole."""
        given = [MIRRORED if x in self.whole else self.states[x] for x in node.inputs]
        partial = {i for i, state in enumerate(given) if state is PARTIAL}
        for group in find(node.op).linear if partial else ():
            addends = [i for i in group if i not in partial]
            if partial < {*group} and all(node.inputs[i].op == "weight" for i in addends):
                for i in addends:  # a bias is added by one device
                    given[i] = PARTIAL
        if self._exact and (found := self._part_of_whole(node)):
            return found
        try:
            return given, result(node, given) if given else MIRRORED
        except Unsplittable:
            return self._rows(node), result(node, self._rows(node))

    def _part_of_whole(self, node: Tensor) -> Found | None:
        """With a stretch of the result for each device, where one comes so and others are whole."""
        if any(x.base.op == "state" for x in node.inputs):
            return None  # everybody keeps all of it
        for number, x in enumerate(node.inputs):
            own = self.states[x]
            if not isinstance(own, Split):
                continue
            for axis, link in links(node, number, own.axis, OUT):
                split = carried(own, axis, link)
                if split is None:
                    continue
                with contextlib.suppress(Unsplittable):
                    uses = needs(node, split)
                    given = zip(node.inputs, uses, strict=True)
                    if all(self.states[x] in (MIRRORED, use) for x, use in given):
                        return uses, split
        return None

    def _holders(self, node: Tensor, state: State, everybody: int) -> int:
        state = state.experts if isinstance(state, Routed) else state
        if isinstance(state, Split):
            return reduce(or_, (1 << device for owners, _ in state.runs for device in owners), 0)
        if state is MIRRORED:
            return everybody
        given = zip(node.inputs, self.uses[node], strict=True)
        return reduce(or_, (self._holders(x, use, 0) for x, use in given), 0)


def _scattered(layout: Layout, regions: Sequence[Region]) -> dict[Tensor, str]:
    """Anchors for which a device would take several stretches of something computed whole."""
    return {
        region.anchor: f"{x!r} would be taken in many pieces"
        for node, uses in layout.uses.items()
        for x, use in zip(node.inputs, uses, strict=True)
        if isinstance(use, Split) and layout.states[x] != use and x.op not in _CUT
        if any(len(use.cut(device)) > 1 for device in range(layout.devices))
        for region in regions
        if node in region.labels or node in region.summed
    }


_CUT = ("weight", "constant", "state")


def _reasons(
    graph: Graph, uses: Mapping[Tensor, tuple[State, ...]], refused: Mapping[Tensor, str],
    regions: Sequence[Region],
) -> dict[Tensor, str]:  # fmt: skip
    mirrored = {
        x: refused.get(node, f"{node.op} takes it whole")
        for node in reversed(graph.nodes)  # what is said by the first
        for x, use in zip(node.inputs, uses[node], strict=True)
        if x.op == "weight" and use is MIRRORED
    }
    return mirrored | {w: r.why for r in regions if r.why for w, _ in r.weights()}
