"""Which tensors are split over devices, and how: inferred from a graph alone.

A product with a weight can be summed from parts wherever its input is computed in parts: an ANCHOR.
From its input the split runs backwards, through views, norms of what stays together, attention and
projections, to weights and caches, and sideways to whatever else takes part; all of that is the
anchor's REGION. The smallest parts that can be told apart there (heads, groups of heads that share
a K head, blocks of a quantised weight, units of a gated product) are found by following every unit
of the axis through the region and joining those that an op keeps together. They are dealt out by
bytes of weights. What is left over is mirrored, which is always right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from runtime.ops.axes import OUT, Link, is_summed, links, needs, result, summands
from runtime.ops.graph import Graph
from runtime.ops.registry import Kind, find
from runtime.ops.splits import (
    MIRRORED,
    PARTIAL,
    Split,
    State,
    Unsplittable,
    split_of,
)
from runtime.ops.tensor import LEAVES, Tensor

_UNIT = 32  # elements of an axis that stay together where there are plenty
_FEW = 8  # parts a device, at least, for that


@dataclass(frozen=True)
class Layout:
    """How each tensor of a graph lies on `devices` devices.

    states: as computed, PARTIAL before it is summed; a weight that some uses cut is MIRRORED.
    uses: of each node the states in which it takes its inputs. holders: the devices that compute
    a node, as bits. whole: what is summed or gathered for those that take it whole, and its number
    in order. why: of weights that are mirrored the reason.
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


def infer(graph: Graph, shares: Sequence[float]) -> Layout:
    """The layout over len(shares) devices; shares are above 0, of the weights' bytes."""
    refused: dict[Tensor, str] = {}
    while True:
        regions = _regions(graph, len(shares), refused) if len(shares) > 1 else []
        layout = _layout(graph, len(shares), _dealt(regions, shares), regions, refused)
        scattered = _scattered(layout, regions)
        if not scattered:
            return layout
        refused |= scattered


class Region:
    """What is split with one anchor: atoms are units of the axis that it begins with.

    labels: tensor -> axis, and int64 [length, m], the atoms at each index (-1: none). whole: those
    that are computed whole all the same, of which each device takes a part. summed: products over
    an axis that is split, and which. root: atom -> the least one that it is joined with.
    """

    def __init__(self, graph: Graph, anchor: Tensor, atoms: int, coarse: bool) -> None:
        self.graph, self.anchor, self.coarse = graph, anchor, coarse
        self.labels: dict[Tensor, tuple[int, np.ndarray]] = {}
        self.whole: set[Tensor] = set()
        self.summed: dict[Tensor, tuple[int, Tensor]] = {}
        self.root = np.arange(atoms)
        self._queue: list[Tensor] = []

    def grow(self, start: Tensor, axis: int, atoms: np.ndarray) -> None:
        """Follow the atoms from an axis of `start`; Unsplittable where that cannot be."""
        self._put(start, axis, atoms[:, None])
        while self._queue:
            tensor = self._queue.pop(0)
            self._backward(tensor)
            if tensor.op in ("weight", "constant"):
                _, found = self.labels[tensor]
                if axis_of(self.labels[tensor]) == tensor.ndim - 1 and tensor.dtype.block > 1:
                    self._join(found.reshape(-1, tensor.dtype.block * found.shape[1]))
            elif tensor not in self.whole:
                self._forward(tensor)

    def weights(self) -> Iterator[tuple[Tensor, np.ndarray]]:
        """The weights that are cut, and the atoms at each index."""
        for tensor, (_, atoms) in self.labels.items():
            if tensor.op == "weight":
                yield tensor, atoms

    def classes(self) -> list[int]:
        """One atom of each part, in order."""
        return np.unique(self.root).tolist()

    def nbytes(self) -> np.ndarray:
        """float64 [atoms]: bytes of weights of each part, at its first atom."""
        found = np.zeros(len(self.root))
        for tensor, atoms in self.weights():
            each = tensor.nbytes / max(1, len(atoms))
            for column in self.root[atoms].T:
                np.add.at(found, column[column >= 0], each / atoms.shape[1])
        return found

    def groups(self) -> list[list[int]]:
        """Parts by what they share with one another, such as a K head; none if nothing."""
        for _, atoms in self.labels.values():
            if atoms.shape[1] > 1 and (atoms >= 0).all():
                rows = [list(dict.fromkeys(row)) for row in self.root[atoms].tolist()]
                return list(map(list, dict.fromkeys(map(tuple, rows))))
        return []

    def _put(self, tensor: Tensor, axis: int, atoms: np.ndarray) -> None:
        if self.coarse and atoms.shape[1] > 1:
            atoms = self._joined(atoms)
        if tensor not in self.labels:
            self.labels[tensor] = axis, atoms
        else:
            before, known = self.labels[tensor]
            if before != axis:
                raise Unsplittable(f"{tensor!r} would be split along axes {before} and {axis}")
            if known.shape != atoms.shape:
                width = max(known.shape[1], atoms.shape[1])
                known, atoms = (
                    a if a.shape[1] == width else self._joined(a).repeat(width, 1)
                    for a in (known, atoms)
                )
            both = (known >= 0) & (atoms >= 0) & (known != atoms)
            self._join(np.stack([known[both], atoms[both]], 1))
            merged = np.where(known >= 0, known, atoms)
            if np.array_equal(known, merged):
                return
            self.labels[tensor] = axis, merged
        self._queue.append(tensor)

    def _backward(self, node: Tensor) -> None:
        """Ask of the inputs what a split of the result needs; some results are computed whole."""
        if node.op in LEAVES:
            if node.op == "input":
                self.whole.add(node)
            return
        asked = [self._carry(node, OUT, number) for number in range(len(node.inputs))]
        if not any(asked):
            self.whole.add(node)

    def _forward(self, tensor: Tensor) -> None:
        axis, _ = self.labels[tensor]
        for user in self.graph.users[tensor]:
            for number, x in enumerate(user.inputs):
                if x is tensor:
                    self._use(user, number, axis)
        if tensor in self.graph.outputs and tensor is not self.anchor:
            raise Unsplittable(f"{tensor!r} is wanted whole")

    def _use(self, user: Tensor, number: int, axis: int) -> None:
        found = list(links(user, number, axis, OUT))
        if found:
            at, link = min(found, key=lambda pair: self._joins(user.inputs[number], pair[1]))
            back = next(other for n, other in links(user, OUT, at, number) if n == axis)
            if not back.shared:  # else the result tells more than this input
                self._push(user.inputs[number], user, at, link)
        elif is_summed(user, number, axis):
            self.summed[user] = number, user.inputs[number]
            for other in range(len(user.inputs)):
                if other != number:
                    self._carry(user, number, other)
        else:
            raise Unsplittable(f"{user.op} ({user.name}) takes axis {axis} whole")

    def _carry(self, node: Tensor, source: int, target: int) -> bool:
        """Put on an input what another operand has; False: they have nothing in common."""
        tensor = node if source == OUT else node.inputs[source]
        for at, link in links(node, source, axis_of(self.labels[tensor]), target):
            self._push(tensor, node.inputs[target], at, link)
            return True
        return False

    def _push(self, source: Tensor, target: Tensor, axis: int, link: Link) -> None:
        _, atoms = self.labels[source]
        beside = np.append(atoms, np.full((1, atoms.shape[1]), -1), 0)
        found = beside[link.places]  # [length, places that go with an index, atoms of each]
        if not (found >= 0).any():
            return
        if link.shared:
            self._put(target, axis, found.reshape(len(found), -1))
        else:
            columns = [self._joined(column) for column in np.moveaxis(found, 2, 0)]
            self._put(target, axis, np.concatenate(columns, 1))

    def _joins(self, tensor: Tensor, link: Link) -> int:
        """How many indices of the target would join atoms."""
        roots = self.root[self.labels[tensor][1][:, 0]][link.places]
        return 0 if link.shared else int((roots != roots[:, :1]).any(1).sum())

    def _joined(self, atoms: np.ndarray) -> np.ndarray:
        """The first atom at each index, once all of an index are joined."""
        if atoms.shape[1] > 1:
            self._join(atoms)
            atoms = np.take_along_axis(atoms, np.argmax(atoms >= 0, 1)[:, None], 1)
        return atoms

    def _join(self, together: np.ndarray) -> None:
        """Atoms of one row belong together; -1 is none."""
        if not together.size:
            return
        most = len(self.root)
        while True:
            roots = np.where(together >= 0, self.root[together], most)
            least = np.minimum(roots.min(1), most - 1)
            if ((roots == least[:, None]) | (together < 0)).all():
                return
            before = self.root.copy()
            for column, known in zip(roots.T, (together >= 0).T, strict=True):
                np.minimum.at(self.root, column[known], least[known])
            self.root = self.root[self.root]
            if np.array_equal(before, self.root):
                return


def axis_of(label: tuple[int, np.ndarray]) -> int:
    """The axis that a tensor of a region is split along."""
    return label[0]


def _regions(graph: Graph, devices: int, refused: dict[Tensor, str]) -> list[Region]:
    """The regions of all anchors that are worth it, in the order of the anchors."""
    found: list[Region] = []
    taken: set[Tensor] = set()
    for node in graph.nodes:
        reasons = [refused[node]] if node in refused else []
        for start, axis in () if node in refused else _starts(graph, node):
            try:
                region = _grown(graph, node, start, axis, devices)
                _check(region, node, taken)
            except Unsplittable as reason:
                reasons.append(str(reason))
                continue
            found.append(region)
            taken |= region.labels.keys() - region.whole
            break
        else:
            if reasons:
                refused[node] = reasons[0]
    return found


def _starts(graph: Graph, node: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Axes that a region may begin with: what a node sums over, and rows of what is wanted."""
    weights = [x.op == "weight" for x in node.inputs]
    if not any(weights):
        return
    for number, x in enumerate(node.inputs):
        for axis in range(x.ndim):
            if x.op not in LEAVES and is_summed(node, number, axis):
                yield x, axis
    if node in graph.outputs:
        yield node, node.ndim - 1


def _grown(graph: Graph, node: Tensor, start: Tensor, axis: int, devices: int) -> Region:
    """Groups stay together where there are enough of them for all devices."""
    n = int(start.shape[axis])
    unit = max(x.dtype.block for x in node.inputs if x.op == "weight") if start is not node else 1
    unit = unit if n % unit == 0 else n
    if unit == 1 and n % _UNIT == 0 and n // _UNIT >= _FEW * devices:
        unit = _UNIT
    for coarse in (True, False):
        region = Region(graph, node, n // unit, coarse)
        region.grow(start, axis, np.arange(n) // unit)
        if len(region.classes()) >= devices:
            break
    return region


def _check(region: Region, node: Tensor, taken: set[Tensor]) -> None:
    """Unsplittable unless it splits work that no other region has."""
    if taken & (region.labels.keys() - region.whole):
        raise Unsplittable("what it would split is split otherwise")
    if node not in region.labels and not any(
        weight not in region.anchor.inputs for weight, _ in region.weights()
    ):
        raise Unsplittable("its input is not computed in parts")
    if len(region.classes()) < 2:
        raise Unsplittable("it has no parts that could be told apart")


def _dealt(regions: Sequence[Region], shares: Sequence[float]) -> list[np.ndarray]:
    """int64 [atoms] for each region: its devices as bits.

    What a device got too much of in one region it gets less of in the next.
    """
    ends = np.array(list(accumulate(shares))) / sum(shares)
    given, total, found = np.zeros(len(shares)), 0.0, []
    for region in regions:
        costs = region.nbytes()
        classes, groups = region.classes(), region.groups()
        total += costs.sum()
        if 0 < len(groups) < len(shares):
            owner = _by_group(groups, costs, ends, given, total)
        else:
            owner = _in_order(classes, costs, ends * total - given)
        for atom, device in owner.items():
            given[device:] += costs[atom]
        bits = np.zeros(len(region.root), np.int64)
        for atom, device in owner.items():
            bits[atom] = 1 << device
        found.append(bits[region.root])
    return found


def _in_order(classes: Sequence[int], costs: np.ndarray, ends: np.ndarray) -> dict[int, int]:
    """Stretches of parts, one for each device; `ends`: where they should end, in bytes."""
    sums = np.append(0, np.cumsum(costs[list(classes)]))
    cuts = [int(np.argmin(np.abs(sums - end))) for end in ends]
    cuts = list(accumulate(cuts, max))
    cuts[-1] = len(classes)
    return {atom: int(np.searchsorted(cuts, n, side="right")) for n, atom in enumerate(classes)}


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
        size = costs[group].sum()
        widths = (ends - starts)[devices]
        inner = _in_order(group, costs, np.cumsum(widths) / widths.sum() * size)
        found |= {atom: int(devices[n]) for atom, n in inner.items()}
    return found


def _layout(
    graph: Graph, devices: int, dealt: Sequence[np.ndarray], regions: Sequence[Region],
    refused: Mapping[Tensor, str],
) -> Layout:  # fmt: skip
    everybody = (1 << devices) - 1
    splits: dict[Tensor, Split] = {}
    summed: dict[Tensor, tuple[int, Split]] = {}
    for region, bits in zip(regions, dealt, strict=True):
        owners = np.append(bits, 0)
        own = {
            tensor: split_of(axis, np.bitwise_or.reduce(owners[atoms], 1))
            for tensor, (axis, atoms) in region.labels.items()
        }
        splits |= {
            t: s
            for t, s in own.items()
            if t not in region.whole and t.op not in ("weight", "constant")
        }
        summed |= {node: (number, own[x]) for node, (number, x) in region.summed.items()}
    whole: set[Tensor] = set()  # what is summed or gathered for somebody
    while True:
        found = _Pass(graph, everybody, splits, summed, whole)
        if found.whole == whole:
            break
        whole = found.whole
    order = [node for node in graph.nodes if node in whole]
    return Layout(
        graph, devices, found.states, found.uses, found.holders,
        {node: number for number, node in enumerate(order)},
        _reasons(graph, found.uses, refused),
    )  # fmt: skip


class _Pass:
    """States of all nodes in order, and the inputs that have to be made whole for it.

    whole: of those of a pass before, everybody takes them whole.
    """

    def __init__(
        self, graph: Graph, everybody: int, splits: Mapping[Tensor, Split],
        summed: Mapping[Tensor, tuple[int, Split]], whole: set[Tensor],
    ) -> None:  # fmt: skip
        self.states: dict[Tensor, State] = {}
        self.uses: dict[Tensor, tuple[State, ...]] = {}
        self.holders: dict[Tensor, int] = {}
        self.whole = {*whole}
        for node in graph.nodes:
            uses: Sequence[State]
            state: State
            if node in summed:
                uses, state = summands(node, *summed[node]), PARTIAL
            elif node in splits:
                split = splits[node]
                uses, state = self._parts(node, split), split
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

    def _parts(self, node: Tensor, split: Split) -> Sequence[State]:
        """The states of inputs from which a node is computed in parts."""
        if node.op in LEAVES:
            return []
        if find(node.op).kind is Kind.VIEW:  # a slice is of what its other half is of
            given = [self.states[x] for x in node.inputs]
            with contextlib.suppress(Unsplittable):
                if result(node, given) == split:
                    return given
        return needs(node, split)

    def _taken(self, node: Tensor) -> tuple[Sequence[State], State]:
        """As the inputs come, if the op can; else it takes them whole."""
        given = [MIRRORED if x in self.whole else self.states[x] for x in node.inputs]
        partial = {i for i, state in enumerate(given) if state is PARTIAL}
        for group in find(node.op).linear if partial else ():
            addends = [i for i in group if i not in partial]
            if partial < {*group} and all(node.inputs[i].op == "weight" for i in addends):
                for i in addends:  # a bias is added by one device
                    given[i] = PARTIAL
        try:
            return given, result(node, given) if given else MIRRORED
        except Unsplittable:
            return [MIRRORED] * len(given), MIRRORED

    def _holders(self, node: Tensor, state: State, everybody: int) -> int:
        if isinstance(state, Split):
            return int(np.bitwise_or.reduce(state.masks()))
        if state is MIRRORED:
            return everybody
        found = 0
        for x, use in zip(node.inputs, self.uses[node], strict=True):
            if isinstance(use, Split):
                found |= int(np.bitwise_or.reduce(use.masks()))
            elif use is PARTIAL and x.op not in LEAVES:
                found |= self.holders[x]
        return found


def _scattered(layout: Layout, regions: Sequence[Region]) -> dict[Tensor, str]:
    """Anchors for which a device would take several stretches of something computed whole."""
    found = {}
    for node, uses in layout.uses.items():
        for x, use in zip(node.inputs, uses, strict=True):
            if isinstance(use, Split) and layout.states[x] != use and x.op not in _CUT:
                if all(len(use.cut(device)) < 2 for device in range(layout.devices)):
                    continue
                for region in regions:
                    if node in region.labels or node in region.summed:
                        found[region.anchor] = f"{x!r} would be taken in many pieces"
    return found


_CUT = ("weight", "constant", "state")


def _reasons(
    graph: Graph, uses: Mapping[Tensor, tuple[State, ...]], refused: Mapping[Tensor, str]
) -> dict[Tensor, str]:
    found: dict[Tensor, str] = {}
    for node in graph.nodes:
        for x, use in zip(node.inputs, uses[node], strict=True):
            if x.op == "weight" and use is MIRRORED:
                reason = refused.get(node, f"{node.op} takes it whole")
                found.setdefault(x, reason)
    return found
