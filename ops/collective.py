"""What devices that share a graph compute together.

Only a split makes these ops. Each device has its own graph with the same collectives in it, told
apart by their `number`; what they mean takes the inputs of all devices: see `joined`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime.ops.dtypes import F32, DType
from runtime.ops.graph import Graph
from runtime.ops.registry import Kind, fused, need
from runtime.ops.tensor import Shape, Tensor

Runs = tuple[tuple[tuple[int, ...], int], ...]  # (devices that hold a stretch, its length), ...


def _holds(x: Sequence[Tensor], device: int, holders: Sequence[int]) -> None:
    has = device in holders
    need(len(x) == has, f"device {device} has {'one input' if has else 'no input'}")


def _sum_shape(
    *x: Tensor, shape: Shape, holders: tuple[int, ...], device: int, devices: int, number: int
) -> tuple[Shape, DType]:
    need(bool(holders) and set(holders) <= set(range(devices)), "parts are of some devices")
    _holds(x, device, holders)
    for part in x:
        need(tuple(part.shape) == tuple(shape) and part.dtype is F32, "a part is float32 [shape]")
    return shape, F32


all_sum = fused(
    "all_sum",
    kind=Kind.COLLECTIVE,
    shape=_sum_shape,
    flops=lambda node, seen: (len(node.attrs["holders"]) - 1) * seen.size(node),
)
"""The sum of the inputs of `holders`, added in their order; every device gets all of it.

*x: this device's part, of that shape; none where it is no holder.
"""


def _gather_shape(
    *x: Tensor, shape: Shape, axis: int, runs: Runs, repeat: int, device: int, devices: int,
    number: int, dtype: DType = F32,
) -> tuple[Shape, DType]:  # fmt: skip
    lengths = [n for _, n in runs]
    need(sum(lengths) * repeat == shape[axis], f"{repeat} x {lengths} is not axis {axis}")
    need(all(owners for owners, _ in runs), "every stretch has a holder")
    _holds(x, device, [owner for owners, _ in runs for owner in owners])
    own = repeat * sum(n for owners, n in runs if device in owners)
    for part in x:
        local = (*shape[:axis], own, *shape[axis + 1 :])
        need(tuple(part.shape) == local and part.dtype is dtype, f"a part is {list(local)}")
    return shape, dtype


all_gather = fused("all_gather", kind=Kind.COLLECTIVE, shape=_gather_shape, flops=0)
"""The whole of a tensor whose `axis` is in stretches on the devices; every device gets it.

runs: one period of the axis, which has `repeat` of them; of a stretch that several hold the first
one's counts. *x: this device's stretches one after another; none where it holds nothing.
"""


both = fused(
    "both",
    kind=Kind.VIEW,
    shape=lambda x, *others: x.shape,
    layout=lambda node: node.inputs[0].layout,
)  # the first input, for which the others are computed as well


def with_all(outputs: Sequence[Tensor], collectives: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The same outputs, and behind the first of them what else of the collectives there is.

    A device has to take part in those as well whose results it has no use for.
    """
    reached, others = set(Graph(tuple(outputs)).nodes), []
    for node in reversed(collectives):
        if node not in reached:
            others.append(node)
            reached |= set(Graph((node,)).nodes)
    first, *more = outputs
    return both(first, *others) if others else first, *more


def joined(node: Tensor, parts: Sequence[np.ndarray | None]) -> np.ndarray:
    """The result of a collective, from the input of each device; None where it has none."""
    held: list[Any] = list(parts)
    if all_sum.made(node):
        first, *others = node.attrs["holders"]
        total = held[first]
        for holder in others:
            total = total + held[holder]
        return total
    axis, runs, repeat = (node.attrs[name] for name in ("axis", "runs", "repeat"))
    starts, found = [0] * node.attrs["devices"], []
    for owners, n in runs * repeat:
        of = held[owners[0]]
        found.append(of.take(range(starts[owners[0]], starts[owners[0]] + n), axis))
        for owner in owners:
            starts[owner] += n
    return np.concatenate(found, axis)
