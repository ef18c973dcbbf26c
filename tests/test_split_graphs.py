"""Random graphs in parts, by the split rules alone: each device on its own, any states and shares.

Leaves are dealt out at random. Each node is computed in one of the ways that the rules allow for
what its inputs are, after gathering, summing or cutting some of them; then everything is compared
with the undivided run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import RandomGraph, Values
from split_parts import local_attrs

from runtime.ops import axes
from runtime.ops.dtypes import I32
from runtime.ops.registry import OPS, find
from runtime.ops.splits import (
    MIRRORED,
    PARTIAL,
    Split,
    State,
    Unsplittable,
    cut_array,
    join_arrays,
    local_shape,
    split_of,
)
from runtime.ops.tensor import LEAVES, Tensor, stored_name

Parts = list[np.ndarray]


class Way(NamedTuple):
    """How a node may be computed: the states in which its inputs are taken, and of the result."""

    uses: tuple[State, ...]
    out: State


class Divided:
    """A graph's run on `devices`; `kinds` counts what was computed in parts, by op and state."""

    def __init__(self, made: RandomGraph, devices: int, seed: int) -> None:
        self.devices, self.rng, self.kinds = devices, np.random.default_rng(seed), Counter[str]()
        self.held: dict[Tensor, tuple[State, Parts]] = {}
        self.leaves: dict[Tensor, tuple[State, Parts]] = {}
        self._values = made.values
        for node in made.graph.nodes:
            if node.op in LEAVES:
                self._leaf(node, made.values)
            else:
                self._compute(node)

    def take(self, x: Tensor, use: State) -> Parts:
        """What each device has of x in another state, cut, gathered or summed where it must be."""
        state, parts = self.held[x]
        if state == use:
            return parts
        whole = join_arrays(parts, state)
        if use is PARTIAL:
            return self._summands(whole)
        return [cut_array(whole, use, device) for device in range(self.devices)]

    def _leaf(self, node: Tensor, values: Values) -> None:
        value = node.attrs["value"] if node.op == "constant" else values[stored_name(node)]
        states: list[State] = [MIRRORED]
        if node.op != "state":  # memory is dealt out by who writes it
            states += [self._split(node, axis) for axis in range(node.ndim)]
            states += [PARTIAL] * (value.dtype.kind == "f")
        self._hold(node, np.array(value), states[self.rng.integers(len(states))])

    def _hold(self, node: Tensor, value: np.ndarray, state: State) -> None:
        if state is PARTIAL:
            self.held[node] = state, self._summands(value)
        else:
            parts = [cut_array(value, state, device).copy() for device in range(self.devices)]
            self.held[node] = state, parts

    def _summands(self, whole: np.ndarray) -> Parts:
        others = [self.rng.standard_normal(whole.shape) for _ in range(self.devices - 1)]
        return [*others, whole - sum(others)]

    def _split(self, x: Tensor, axis: int) -> Split:
        """Any owners, in blocks or not; some devices may have nothing, some places two owners."""
        n = int(x.shape[axis])
        unit = self.rng.choice([k for k in range(1, n + 1) if n % k == 0])
        owners = self.rng.integers(0, self.devices, n // unit)
        owners = np.sort(owners) if self.rng.random() < 0.5 else owners
        masks = np.left_shift(1, owners.astype(np.int64))
        if self.rng.random() < 0.2:
            masks |= np.left_shift(1, self.rng.integers(0, self.devices, n // unit))
        return split_of(axis, masks.repeat(unit))

    def _compute(self, node: Tensor) -> None:
        ways = [*self._ways(node)]
        parted = [way for way in ways if way.out is not MIRRORED]
        summed = [way for way in ways if way.out is PARTIAL]
        for some, often in ((parted, 0.9), (summed, 0.3)):
            if some and self.rng.random() < often:
                ways = some
        way = ways[self.rng.integers(len(ways))]
        assert axes.result(node, way.uses) == way.out
        self.kinds[f"{node.op} {'split' if isinstance(way.out, Split) else way.out}"] += 1
        for number in find(node.op).writes:
            leaf = node.inputs[number]
            self._hold(leaf, self._values[stored_name(leaf)], way.uses[number])
        taken = [self.take(x, use) for x, use in zip(node.inputs, way.uses, strict=True)]
        parts = [self._part(node, way, device, taken) for device in range(self.devices)]
        self.held[node] = way.out, parts

    def _ways(self, node: Tensor) -> Iterator[Way]:
        yield Way(tuple(MIRRORED for _ in node.inputs), MIRRORED)
        found = [self._asked(node, self._split(node, axis)) for axis in range(node.ndim)]
        for number, x in enumerate(node.inputs):
            state, _ = self.held[x]
            if state is PARTIAL:
                linear = [group for group in ((number,), *find(node.op).linear) if number in group]
                found += [self._result(node, _partial(node, group)) for group in linear]
            if not isinstance(state, Split):
                continue
            for at, link in axes.links(node, number, state.axis, axes.OUT):
                split = axes.carried(state, at, link)
                found.append(self._asked(node, split) if split else None)
            if axes.is_summed(node, number, state.axis):
                found.append(self._summed(node, number, state))
        yield from (way for way in found if way)

    def _asked(self, node: Tensor, split: Split) -> Way | None:
        try:
            return self._result(node, axes.needs(node, split))
        except Unsplittable:
            return None

    def _summed(self, node: Tensor, number: int, split: Split) -> Way | None:
        try:
            return self._result(node, axes.summands(node, number, split))
        except Unsplittable:
            return None

    def _result(self, node: Tensor, uses: Sequence[State]) -> Way | None:
        try:
            return Way(tuple(uses), axes.result(node, uses))
        except Unsplittable:
            return None

    def _part(self, node: Tensor, way: Way, device: int, taken: list[Parts]) -> np.ndarray:
        uses, out = way
        if any(isinstance(use, Split) and use.local(device) == 0 for use in uses):
            shape = [int(n) for n in local_shape(node.shape, out, device)]
            return np.zeros(shape, np.int32 if node.dtype is I32 else float)
        attrs = local_attrs(node, uses, out, device)
        return OPS[node.op].reference(*(parts[device] for parts in taken), **attrs)


def _partial(node: Tensor, group: Sequence[int]) -> list[State]:
    return [PARTIAL if i in group else MIRRORED for i in range(len(node.inputs))]


def compare(got: np.ndarray, wanted: np.ndarray, what: object) -> None:
    """To 1e-10 of the largest number."""
    assert got.shape == wanted.shape, f"{what!r}: {got.shape} for {wanted.shape}"
    error = np.abs(got - wanted).max(initial=0)
    assert error <= 1e-10 * max(1, np.abs(wanted).max(initial=0)), f"{what!r}: {error}"


def _check(seed: int, size: int, devices: int) -> Counter[str]:
    made = RandomGraph(seed, size)
    whole, after = made.whole()
    divided = Divided(made, devices, seed + 1)
    for node, (state, parts) in divided.held.items():
        wanted = after[stored_name(node)] if node.op == "state" else whole[node]
        if isinstance(state, Split):
            wanted = wanted.copy()
            np.moveaxis(wanted, state.axis, 0)[state.masks() == 0] = 0
        compare(join_arrays(parts, state), wanted, node)
        for device, part in enumerate(parts if state is not PARTIAL else ()):
            compare(part, cut_array(wanted, state, device), node)
    return divided.kinds


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(10, 30), st.integers(1, 5))
def test_any_states_give_the_undivided_numbers(seed: int, size: int, devices: int):
    _check(seed, size, devices)


def test_most_of_it_is_computed_in_parts():
    """And every op that may be split is; of angles and numbers of experts there is one copy."""
    kinds = sum((_check(seed, 25, 3) for seed in range(40)), Counter[str]())
    parted = {kind.split()[0] for kind in kinds if not kind.endswith("mirrored")}
    assert parted == {*OPS} - {"rope_angles", "renumber"}
    assert sum(kinds[k] for k in kinds if not k.endswith("mirrored")) > 0.6 * kinds.total()
