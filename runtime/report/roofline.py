"""Where a model's phases stand between what memory gives and what the processor can multiply.

A phase is one step of a model; its instructions are put together by class. Intensity is
multiply-adds per byte that has to be read or written: below that of the ridge, where memory's
bandwidth times intensity is the fastest unit's rate, memory bounds, above it the units do. What is
far from both has something else in its way: other instructions, waiting, a unit that is not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.ops.cost import Seen, cost, moves
from runtime.ops.registry import Kind, kind_of

CLASSES = ("matmul", "attention", "delta-net", "rest")


@dataclass(frozen=True)
class Point:
    """The instructions of a class in a phase: seconds, bytes moved, multiply-adds."""

    phase: str
    kind: str
    seconds: float
    nbytes: float
    macs: float

    @property
    def intensity(self) -> float:
        """Multiply-adds for each byte."""
        return self.macs / self.nbytes if self.nbytes else 0.0

    @property
    def rate(self) -> float:
        """Multiply-adds per second."""
        return self.macs / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Roofline:
    """What a machine gives and what a model's phases take of it.

    bandwidths: bytes per second by number of threads, the last those that the model has. units:
    multiply-adds per second of all threads, by name. points: of each phase its classes.
    """

    title: str
    how: str
    bandwidths: Mapping[int, float]
    units: Mapping[str, float]
    points: Sequence[Point]

    @property
    def bandwidth(self) -> float:
        """Of as many threads as the model has."""
        return [*self.bandwidths.values()][-1]

    @property
    def peak(self) -> float:
        """The rate of the fastest unit."""
        return max(self.units.values())

    def shares(self, point: Point) -> tuple[float, float]:
        """What a point reaches of memory's bandwidth, and of the fastest unit's rate."""
        return point.nbytes / max(point.seconds, 1e-12) / self.bandwidth, point.rate / self.peak

    def phases(self) -> list[str]:
        """In the order in which they were measured."""
        return list(dict.fromkeys(point.phase for point in self.points))


def points_of(phase: str, plan: Any, nanoseconds: np.ndarray, seen: Seen) -> list[Point]:
    """A point for each class of a step; an instruction of several is that of its costliest call.

    nanoseconds: int64 [instructions].
    """
    found: dict[str, list[float]] = {}
    for one, spent in zip(plan.instructions, nanoseconds, strict=True):
        costs = [cost(call.node, seen) for call in one.calls]
        heaviest = max(range(len(costs)), key=lambda n: costs[n].bytes + costs[n].flops)
        sums = found.setdefault(class_of(one.calls[heaviest].node, seen), [0.0, 0.0, 0.0])
        sums[0] += int(spent) / 1e9
        sums[1] += sum(c.bytes for c in costs)
        sums[2] += sum(c.flops for c in costs) / 2
    return [Point(phase, kind, *found[kind]) for kind in CLASSES if kind in found]


def class_of(node: Any, seen: Seen) -> str:
    """One of CLASSES: by the state that a node works on, or as a product with weights."""
    if kind_of(node) is Kind.LEAF:
        return "rest"
    storages = {move.tensor.base.attrs.get("storage") for move in moves(node, seen)}
    if storages & {"k", "v"}:
        return "attention"
    if "slots" in storages:
        return "delta-net"
    return "matmul" if kind_of(node) is Kind.CONTRACTION else "rest"
