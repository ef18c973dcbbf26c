"""What is split together: followed from an axis of one tensor through the graph."""

from __future__ import annotations

import numpy as np

from runtime.ops.axes import OUT, Link, is_summed, links
from runtime.ops.cached import cached_property
from runtime.ops.graph import Graph
from runtime.ops.splits import Unsplittable
from runtime.ops.tensor import LEAVES, Tensor


class Region:
    """What is split with one anchor: atoms are units of the axis that it begins with.

    labels: tensor -> axis, and int64 [length, m], the atoms at each index (-1: none). whole: those
    that are computed whole all the same, of which each device takes a part. summed: products over
    an axis that is split, and which. root: atom -> the least one that it is joined with. why: of
    experts that stay whole the reason.
    """

    def __init__(
        self, graph: Graph, anchor: Tensor, atoms: int, coarse: bool, exact: bool = False
    ) -> None:
        self.graph, self.anchor, self.coarse, self.exact = graph, anchor, coarse, exact
        self.why = ""
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
                axis, found = self.labels[tensor]
                if axis == tensor.ndim - 1 and tensor.dtype.block > 1:
                    self._join(found.reshape(-1, tensor.dtype.block * found.shape[1]))
            elif tensor not in self.whole:
                self._forward(tensor)
        for node, (_, x) in self.summed.items():
            if (self.labels[x][1] < 0).any():
                raise Unsplittable(f"{node.op} ({node.name}) needs all of {x!r}")
            if not self.exact:  # what two devices have would count twice
                self._join(self.labels[x][1])

    def weights(self) -> list[tuple[Tensor, np.ndarray]]:
        """The weights that are cut, and the atoms at each index."""
        return [(x, atoms) for x, (_, atoms) in self.labels.items() if x.op == "weight"]

    def classes(self) -> list[int]:
        """One atom of each part, in order."""
        return np.unique(self.root).tolist()

    @cached_property
    def nbytes(self) -> np.ndarray:
        """float64 [atoms]: bytes of weights of each part, at its first atom; once it is grown."""
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
        if "uncut" in tensor.attrs:
            raise Unsplittable(f"{tensor!r} is kept whole")
        if self.coarse and atoms.shape[1] > 1:
            atoms = self._joined(atoms)
        if tensor not in self.labels:
            self.labels[tensor] = axis, atoms
        else:
            before, known = self.labels[tensor]
            if before != axis:
                raise Unsplittable(f"{tensor!r} would be split along axes {before} and {axis}")
            if known is atoms or np.array_equal(known, atoms):
                return
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
        found = links(user, number, axis, OUT)
        if found:
            at, link = min(found, key=lambda pair: self._joins(user.inputs[number], pair[1]))
            back = next(other for n, other in links(user, OUT, at, number) if n == axis)
            if not back.shared:  # else the result tells more than this input
                self._push(user.inputs[number], user, at, link)
        elif is_summed(user, number, axis):
            self.summed[user] = number, user.inputs[number]
            for other, x in enumerate(user.inputs):
                if other != number and not (self.exact and x.op == "weight"):
                    self._carry(user, number, other)
        else:
            raise Unsplittable(f"{user.op} ({user.name}) takes axis {axis} whole")

    def _carry(self, node: Tensor, source: int, target: int) -> bool:
        """Put on an input what another operand has; False: they have nothing in common."""
        tensor = node if source == OUT else node.inputs[source]
        for at, link in links(node, source, self.labels[tensor][0], target):
            self._push(tensor, node.inputs[target], at, link)
            return True
        return False

    def _push(self, source: Tensor, target: Tensor, axis: int, link: Link) -> None:
        _, atoms = self.labels[source]
        if link.same:
            self._put(target, axis, atoms)
            return
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
        if link.shared or link.places.shape[1] == 1:
            return 0
        roots = self.root[self.labels[tensor][1][:, 0]][link.places]
        return int((roots != roots[:, :1]).any(1).sum())

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
