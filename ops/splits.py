"""How a tensor lies on several devices: mirrored, partial, split along one axis, or routed.

A split says who owns which stretch of an axis, as RUNS: one period of (owners, length) and how
often it repeats. A fused q|k|v projection of two devices is six runs; heads flattened with T tokens
into rows are two runs repeated T times. A stretch may have several owners (a K head that two
devices need) or none. Each device keeps its stretches one after another, in order, so the same op
runs on what it has. `cut_array` and `join_arrays` are what all of this means.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from functools import lru_cache
from itertools import groupby
from math import gcd
from typing import NamedTuple

import numpy as np

from runtime.ops.cuts import Runs
from runtime.ops.errors import OpError
from runtime.ops.tensor import Shape, Tensor

Owners = tuple[int, ...]  # devices by number, rising
MOST_DEVICES = 63  # owners of a stretch are bits of an int64 where many are looked at


class Unsplittable(OpError):  # noqa: N818  not a failure by itself
    """A split cannot pass here; the text says why."""


class Whole(Enum):
    """States of a tensor that no axis is cut for."""

    MIRRORED = "every device has all of it"
    PARTIAL = "it is the sum of what the devices have"

    def __str__(self) -> str:
        return self.name.lower()


MIRRORED, PARTIAL = Whole.MIRRORED, Whole.PARTIAL


class Split(NamedTuple):
    """Owners of every index of `axis`: `runs` = (owners, length) one after another, `repeat` times.

    Make it with `split_of` or `normal`: equal splits are equal tuples then.
    """

    axis: int
    runs: tuple[tuple[Owners, int], ...]
    repeat: int = 1

    @lru_cache(1024)  # noqa: B019  of what is equal
    def masks(self) -> np.ndarray:
        """int64 [length of the axis], to read: the owners of every index, device d as bit d."""
        bits = np.array([sum(1 << d for d in owners) for owners, _ in self.runs], np.int64)
        found = np.tile(bits.repeat([n for _, n in self.runs]), self.repeat)
        found.flags.writeable = False
        return found

    def local(self, device: int) -> int:
        """Length of the axis on one device."""
        return self.repeat * sum(n for owners, n in self.runs if device in owners)

    def cut(self, device: int) -> Runs:
        """The stretches of one device, as ops/cuts.py takes them."""
        found, at = [], 0
        for owners, n in self.runs * self.repeat:
            if device in owners:
                found.append((at, at + n))
            at += n
        return tuple(found)

    def __str__(self) -> str:
        shown = " ".join(f"{n}@{'+'.join(map(str, owners)) or '-'}" for owners, n in self.runs[:8])
        more = " ..." if len(self.runs) > 8 else ""
        return f"axis {self.axis}: {shown}{more}" + (f" x{self.repeat}" if self.repeat > 1 else "")


class Routed(NamedTuple):
    """Every device has room for all rows [token, choice, ...]; those of its experts are right.

    ids: [token, choice], the experts chosen, known in the step alone. experts: their owners, along
    axis 0 of weights. What other rows hold means nothing.
    """

    ids: Tensor
    experts: Split

    def __str__(self) -> str:
        return f"by expert {self.experts}"


State = Split | Routed | Whole


def normal(axis: int, runs: Sequence[tuple[Owners, int]], repeat: int = 1) -> Split:
    """The canonical form: no empty runs, neighbours joined, the shortest period."""
    stretches = [(owners, n) for owners, n in runs if n]
    unit = gcd(*(n for _, n in stretches))
    cells = [owners for owners, n in stretches for _ in range(n // unit)] if unit else []
    period = _period(cells)
    joined = [(owners, unit * len(list(group))) for owners, group in groupby(cells[:period])]
    times = repeat * (len(cells) // period) if period else 1
    if len(joined) == 1:  # one owner: no period to speak of
        joined, times = [(joined[0][0], joined[0][1] * times)], 1
    return Split(axis, tuple(joined), times)


def _period(cells: Sequence[Owners]) -> int:
    n = len(cells)
    for p in range(1, n // 2 + 1):
        if n % p == 0 and cells[p:] == cells[:-p]:
            return p
    return n


def split_of(axis: int, masks: np.ndarray) -> Split:
    """The split with these owners, int64 [length of the axis]; see `Split.masks`."""
    return _split_of(axis, masks.tobytes())


@lru_cache(1024)
def _split_of(axis: int, content: bytes) -> Split:
    masks = np.frombuffer(content, np.int64)
    edges = np.flatnonzero(np.diff(masks)) + 1
    starts, ends = np.append(0, edges), np.append(edges, len(masks))
    runs = [
        (owners_of(int(masks[a])), int(b - a))
        for a, b in zip(starts.tolist(), ends.tolist(), strict=True)
        if b > a
    ]
    return normal(axis, runs)


def owners_of(mask: int) -> Owners:
    """The devices that are bits of a number."""
    return tuple(d for d in range(MOST_DEVICES) if mask >> d & 1)


def local_shape(shape: Shape, state: State, device: int) -> Shape:
    """The shape of what one device has of a tensor; sizes that stay keep their names."""
    if not isinstance(state, Split):
        return tuple(shape)
    return (*shape[: state.axis], state.local(device), *shape[state.axis + 1 :])


def cut_array(x: np.ndarray, state: State, device: int) -> np.ndarray:
    """What one device has of x. Of a partial tensor the first has all, the others zeros."""
    if state is PARTIAL:
        return x if device == 0 else np.zeros_like(x)
    if not isinstance(state, Split):
        return x
    return np.compress(state.masks() >> device & 1 != 0, x, axis=state.axis)


def join_arrays(parts: Sequence[np.ndarray], state: State) -> np.ndarray:
    """The tensor of which each device has a part; a stretch of several owners is the first's.

    Stretches that nobody owns are zeros.
    """
    if state is PARTIAL:
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total
    if not isinstance(state, Split):
        return parts[0]
    masks = state.masks()
    shape = list(parts[0].shape)
    shape[state.axis] = len(masks)
    whole = np.zeros(shape, parts[0].dtype)
    for device in reversed(range(len(parts))):
        index: list[slice | np.ndarray] = [slice(None)] * whole.ndim
        index[state.axis] = np.flatnonzero(masks >> device & 1)
        whole[tuple(index)] = parts[device]
    return whole
