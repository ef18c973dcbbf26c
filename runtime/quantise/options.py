"""The types that tensors could get, with bytes and cost, and the choice of one for each."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from runtime.ops.dtypes import DType


class Option(NamedTuple):
    """A type for a tensor. cost: what its errors do to the model's predictions (divergence)."""

    dtype: DType
    nbytes: int
    cost: float


Chosen = dict[str, Option]


def worthwhile(options: Sequence[Option]) -> list[Option]:
    """Those that are best for some price of a byte, smallest first: each step up from one to the
    next saves less cost per byte than the one before."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.cost)):
        if kept and option.cost >= kept[-1].cost:
            continue
        while len(kept) > 1 and _saved(kept[-2], kept[-1]) <= _saved(kept[-2], option):
            kept.pop()
        kept.append(option)
    return kept


def _saved(a: Option, b: Option) -> float:
    """Cost saved for each byte more."""
    return (a.cost - b.cost) / (b.nbytes - a.nbytes)


def choose(
    options: Mapping[str, Sequence[Option]], nbytes: float | None = None, cost: float = 0.0
) -> Chosen:
    """An option for each tensor: least cost in so many bytes, or fewest bytes at that cost.

    nbytes: of all together. cost: all together; where it is reached nothing more is spent.
    The smallest of each are more than `nbytes`, or the largest cost more than `cost`: these.
    """
    steps = {name: worthwhile(found) for name, found in options.items()}
    at = dict.fromkeys(steps, 0)
    spent = sum(found[0].nbytes for found in steps.values())
    total = sum(found[0].cost for found in steps.values())
    queue = [(-_saved(*found[:2]), name) for name, found in steps.items() if len(found) > 1]
    heapq.heapify(queue)
    while queue and total > cost:
        _, name = heapq.heappop(queue)
        now, then = steps[name][at[name] : at[name] + 2]
        if nbytes is not None and spent + then.nbytes - now.nbytes > nbytes:
            continue  # smaller ones may still fit
        at[name] += 1
        spent, total = spent + then.nbytes - now.nbytes, total + then.cost - now.cost
        if at[name] + 1 < len(steps[name]):
            heapq.heappush(queue, (-_saved(*steps[name][at[name] :][:2]), name))
    return {name: found[at[name]] for name, found in steps.items()}
