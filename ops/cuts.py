"""Cuts of leaves: stretches along some of their axes, one after another.

A cut is {axis: runs}, each run (start, stop); axes that it does not name stay whole. Along the last
axis runs are whole blocks of the leaf's dtype. What a cut means is what `cut_array` does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from runtime.ops.dtypes import DType
from runtime.ops.errors import OpError

Shape = tuple[int, ...]
Runs = tuple[tuple[int, int], ...]
Cut = Mapping[int, Runs]
Parts = tuple[tuple[int, Runs], ...]  # a cut in its one canonical form


def canonical(cut: Cut, shape: Shape, dtype: DType) -> Parts:
    """Axes from 0 up, neighbouring runs as one, no empty runs, no axis that is taken whole.

    OpError: an axis or a run outside of `shape`, or inside a block.
    """
    found: dict[int, Runs] = {}
    for axis, runs in cut.items():
        if not -len(shape) <= axis < len(shape):
            raise OpError(f"cut of axis {axis} of {list(shape)}")
        at, size = axis % len(shape), int(shape[axis])
        unit = dtype.block if at == len(shape) - 1 else 1
        for start, stop in runs:
            if not 0 <= start <= stop <= size:
                raise OpError(f"cut {start}:{stop} lies outside axis {axis} of {list(shape)}")
            if start % unit or stop % unit:
                raise OpError(
                    f"cut {start}:{stop} of axis {axis} divides blocks of {unit} of {dtype.name}"
                )
        joined = _joined(runs)
        if joined != ((0, size),):
            found[at] = joined
    return tuple(sorted(found.items()))


def _joined(runs: Runs) -> Runs:
    joined: list[tuple[int, int]] = []
    for start, stop in runs:
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], stop
        elif start < stop:
            joined.append((start, stop))
    return tuple(joined)


def cut_of_cut(outer: Runs, inner: Runs) -> Runs:
    """Stretches `inner` of what the stretches `outer` leave, in numbers of the whole."""
    found = []
    for start, stop in inner:
        at = 0
        for a, b in outer:
            low, high = max(start, at), min(stop, at + b - a)
            if low < high:
                found.append((a + low - at, a + high - at))
            at += b - a
    return tuple(found)


def cut_shape(shape: Shape, parts: Parts) -> Shape:
    """The shape that is left."""
    sizes = {axis: sum(stop - start for start, stop in runs) for axis, runs in parts}
    return tuple(sizes.get(axis, n) for axis, n in enumerate(shape))


def cut_array(x: np.ndarray, parts: Parts) -> np.ndarray:
    """What is left of an array of the whole shape."""
    for axis, runs in parts:
        x = np.take(x, _places(runs), axis)
    return x


def cut_rows(whole: Shape, parts: Parts) -> np.ndarray | None:
    """Which rows (all axes but the last, flattened) are left, int64 in their order; None: all."""
    outer = tuple((axis, runs) for axis, runs in parts if axis < len(whole) - 1)
    if not outer:
        return None
    numbers = np.arange(math.prod(map(int, whole[:-1]))).reshape([int(n) for n in whole[:-1]])
    return cut_array(numbers, outer).reshape(-1)


def label(parts: Parts) -> str:
    """A cut as text: "[0:32+64:96 of axis 0]"."""
    texts = []
    for axis, runs in parts:
        shown = "+".join(f"{start}:{stop}" for start, stop in runs[:3])
        texts.append(f"{shown}{'+...' * (len(runs) > 3)} of axis {axis}")
    return f"[{', '.join(texts)}]"


def _places(runs: Runs) -> np.ndarray:
    return np.concatenate([np.arange(0), *(np.arange(*run) for run in runs)])
