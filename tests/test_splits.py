"""The algebra of splits against brute force: an owner written beside every element."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import ops
from runtime.ops.axes import OUT, carried, links, needs, result
from runtime.ops.cuts import canonical
from runtime.ops.cuts import cut_array as cut_runs
from runtime.ops.dtypes import F32
from runtime.ops.splits import (
    MIRRORED,
    PARTIAL,
    Split,
    Unsplittable,
    cut_array,
    join_arrays,
    local_shape,
    normal,
    split_of,
)

DEVICES = 4
Runs = list[tuple[tuple[int, ...], int]]


@st.composite
def run_lists(draw: st.DrawFn, most: int = 4) -> Runs:
    """One period: owners rising, several or none at times, lengths that may be 0."""
    owners = st.sets(st.integers(0, DEVICES - 1), max_size=draw(st.integers(1, 3)))
    stretch = st.tuples(owners.map(lambda found: tuple(sorted(found))), st.integers(0, 4))
    return draw(st.lists(stretch, max_size=most))


def _written_out(runs: Runs, repeat: int) -> list[tuple[int, ...]]:
    return [owners for owners, n in runs for _ in range(n)] * repeat


def _masks(n: int, draw: st.DrawFn, shared: bool = True) -> np.ndarray:
    """Owners of n places in a pattern that has a chance to pass: periods, stretches, noise."""
    most = (1 << DEVICES) - 1 if shared else 2
    choices = st.integers(0, most) if shared else st.integers(0, 2).map(lambda d: 1 << d)
    period = draw(st.sampled_from([k for k in range(1, n + 1) if n % k == 0]))
    unit = draw(st.sampled_from([k for k in range(1, period + 1) if period % k == 0]))
    cells = draw(st.lists(choices, min_size=period // unit, max_size=period // unit))
    return np.tile(np.repeat(np.array(cells, np.int64), unit), n // period)


@settings(max_examples=300, deadline=None)
@given(run_lists(), st.integers(1, 3), st.integers(0, 2))
def test_a_split_is_an_owner_beside_every_index(runs: Runs, repeat: int, axis: int):
    split, owners = normal(axis, runs, repeat), _written_out(runs, repeat)
    assert split.masks().tolist() == [sum(1 << d for d in each) for each in owners]
    shape = tuple(len(owners) if i == axis else 2 for i in range(3))
    x = np.arange(math.prod(shape)).reshape(shape)
    for device in range(DEVICES):
        places = [i for i, each in enumerate(owners) if device in each]
        assert split.local(device) == len(places)
        part = cut_array(x, split, device)
        assert local_shape(shape, split, device) == part.shape
        np.testing.assert_array_equal(part, np.take(x, places, axis))
        runs_cut = canonical({axis: split.cut(device)}, shape, F32)
        np.testing.assert_array_equal(part, cut_runs(x, runs_cut))


@settings(max_examples=300, deadline=None)
@given(run_lists(), st.integers(1, 3), run_lists(), st.integers(1, 3))
def test_equal_owners_are_equal_splits(a: Runs, times: int, b: Runs, often: int):
    one, other = normal(1, a, times), normal(1, b, often)
    assert (one == other) == (_written_out(a, times) == _written_out(b, often))
    assert (str(one) == str(other)) or one != other


@settings(max_examples=300, deadline=None)
@given(run_lists(), st.integers(1, 3))
def test_there_is_one_form(runs: Runs, repeat: int):
    """However it is written down; no empty runs, no equal neighbours, no shorter period."""
    split = normal(0, runs, repeat)
    assert normal(*split) == split == split_of(0, split.masks())
    halves = [(owners, part) for owners, n in runs for part in (n // 2, 0, n - n // 2)]
    assert normal(0, halves * repeat) == split
    assert all(n > 0 for _, n in split.runs)
    assert all(a != b for (a, _), (b, _) in pairwise(split.runs))
    cells = split.masks().tolist()
    period = sum(n for _, n in split.runs)
    for shorter in range(1, period):
        if period % shorter == 0 and len(split.runs) > 1:
            assert cells[shorter:period] != cells[: period - shorter]


@settings(max_examples=200, deadline=None)
@given(run_lists(), st.integers(1, 3), st.integers(0, 2), st.sampled_from(["f8", "i4"]))
def test_joining_undoes_cutting(runs: Runs, repeat: int, axis: int, dtype: str):
    split = normal(axis, runs, repeat)
    owners = _written_out(runs, repeat)
    shape = tuple(len(owners) if i == axis else 2 for i in range(3))
    x = np.arange(1, 1 + math.prod(shape)).reshape(shape).astype(dtype)
    parts = [cut_array(x, split, device) for device in range(DEVICES)]
    joined = join_arrays(parts, split)
    want = np.moveaxis(x.copy(), axis, 0)
    want[[i for i, each in enumerate(owners) if not each]] = 0
    np.testing.assert_array_equal(joined, np.moveaxis(want, 0, axis))
    assert joined.dtype == x.dtype


def test_whole_and_partial_tensors_join_too(rng: np.random.Generator):
    x = rng.standard_normal((3, 4))
    for state in (MIRRORED, PARTIAL):
        parts = [cut_array(x, state, device) for device in range(3)]
        np.testing.assert_array_equal(join_arrays(parts, state), x)
        assert local_shape(x.shape, state, 1) == x.shape
    np.testing.assert_array_equal(parts[1], 0)
    summands = [rng.integers(0, 9, (3, 4)) for _ in range(4)]
    np.testing.assert_array_equal(join_arrays(summands, PARTIAL), sum(summands))


def test_of_a_shared_stretch_the_first_owner_counts():
    split = normal(0, [((0,), 1), ((1, 2), 2), ((2,), 1)])
    parts = [np.array([1]), np.array([2, 3]), np.array([20, 30, 4])]
    np.testing.assert_array_equal(join_arrays(parts, split), [1, 2, 3, 4])


def even(axis: int, lengths: Sequence[int]) -> Split:
    """One stretch for each device, of these lengths."""
    return normal(axis, [((d,), n) for d, n in enumerate(lengths)])


def test_devices_without_a_share_are_absent():
    assert even(0, (2, 0, 4)) == normal(0, [((0,), 2), ((2,), 4)])
    assert even(0, (2, 0, 4)).local(1) == 0
    assert local_shape((6, 5), even(0, (2, 0, 4)), 1) == (0, 5)
    assert normal(0, []) == normal(0, [((1,), 0)]) == Split(0, (), 1)


def test_splits_print_as_one_reads_them():
    fused = normal(1, [((0,), 2), ((1,), 3), ((0, 1), 1), ((), 2)], 5)
    assert str(fused) == "axis 1: 2@0 3@1 1@0+1 2@- x5"
    assert str(normal(0, [((i % 2,), i + 1) for i in range(10)])).endswith("8@1 ...")
    assert (str(MIRRORED), str(PARTIAL)) == ("mirrored", "partial")


# Views: the owners written beside every element take the same way as the elements.


@st.composite
def view_chains(draw: st.DrawFn) -> list[ops.Tensor]:
    """A leaf and up to four views of it, one of the other."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3)))
    chain = [ops.step_input("x", shape, F32)]
    for _ in range(draw(st.integers(1, 4))):
        chain.append(_view(chain[-1], draw))
    return chain


def _view(x: ops.Tensor, draw: st.DrawFn) -> ops.Tensor:
    kind = draw(st.sampled_from(["reshape", "reshape", "slice", "permute", "broadcast", "copy"]))
    if kind == "reshape":
        return ops.reshape(ops.copy(x), shape=_factors(x.size, draw))
    if kind == "slice":
        axis = draw(st.integers(-x.ndim, x.ndim - 1))
        start = draw(st.integers(0, int(x.shape[axis]) - 1))
        stop = draw(st.integers(start + 1, int(x.shape[axis])))
        return ops.slice_(x, axis=axis, start=start, stop=stop)
    if kind == "permute":
        return ops.permute(x, axes=tuple(draw(st.permutations(range(x.ndim)))))
    if kind == "broadcast":
        return ops.broadcast(x, shape=tuple(3 if n == 1 else n for n in x.shape))
    return ops.copy(x)


def _factors(n: int, draw: st.DrawFn) -> tuple[int, ...]:
    found = []
    for _ in range(draw(st.integers(0, 3))):
        found.append(draw(st.sampled_from([k for k in range(1, n + 1) if n % k == 0])))
        n //= found[-1]
    return (*found, n)


def _forward(node: ops.Tensor, x: np.ndarray) -> np.ndarray:
    return ops.OPS[node.op].reference(x, **node.attrs)


def _constant_axes(owners: np.ndarray) -> dict[int, np.ndarray]:
    """Axes along which everything of one index has one owner, with the owners along each."""
    found = {}
    for axis in range(owners.ndim):
        lines = np.moveaxis(owners, axis, 0).reshape(owners.shape[axis], -1)
        if (lines == lines[:, :1]).all():
            found[axis] = lines[:, 0]
    return found


def _spread(shape: Sequence[int], axis: int, masks: np.ndarray) -> np.ndarray:
    return np.broadcast_to(
        masks.reshape([-1 if i == axis else 1 for i in range(len(shape))]), shape
    )


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_split_passes_views_exactly_where_owners_stay_along_an_axis(data: st.DataObject):
    chain = data.draw(view_chains())
    shape = tuple(map(int, chain[0].shape))
    axis = data.draw(st.integers(0, len(shape) - 1))
    owners = _spread(shape, axis, _masks(shape[axis], data.draw))
    for node in ops.Graph((chain[-1],)).nodes[1:]:
        before = [split_of(at, masks) for at, masks in _constant_axes(owners).items()]
        owners = _forward(node, owners)
        after = _constant_axes(owners)
        seen = [
            found
            for split in before
            for at, link in links(node, 0, split.axis, OUT)
            if (found := carried(split, at, link)) is not None
        ]
        for split in seen:
            np.testing.assert_array_equal(split.masks(), after[split.axis])
        one_owner = len({*owners.reshape(-1).tolist()}) == 1  # along every axis then
        if before and not one_owner:
            assert {split.axis for split in seen} == {*after}, "refused without need"


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_device_views_its_own_part(data: st.DataObject):
    """The view of what a device has is what it has of the view."""
    node = data.draw(view_chains())[1]
    x = np.arange(node.inputs[0].size).reshape([int(n) for n in node.inputs[0].shape])
    axis = data.draw(st.integers(0, node.inputs[0].ndim - 1))
    split = split_of(axis, _masks(x.shape[axis], data.draw))
    try:
        seen = result(node, [split])
    except Unsplittable:
        return
    assert isinstance(seen, Split)
    whole = _forward(node, x)
    for device in range(DEVICES):
        attrs = _local_attrs(node, split, seen, device)
        got = ops.OPS[node.op].reference(cut_array(x, split, device), **attrs)
        np.testing.assert_array_equal(got, cut_array(whole, seen, device))


def _local_attrs(node: ops.Tensor, split: Split, seen: Split, device: int) -> dict[str, Any]:
    attrs = dict(node.attrs)
    if "shape" in attrs:
        attrs["shape"] = local_shape(node.shape, seen, device)
    if node.op == "slice" and attrs["axis"] % node.ndim == split.axis:
        has = split.masks() >> device & 1
        attrs |= {key: int(has[: attrs[key]].sum()) for key in ("start", "stop")}
    return attrs


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_slices_one_after_another_are_the_whole_again(data: st.DataObject):
    """Forward the owners of all slices, one after another, are those of the whole; backward too."""
    n = data.draw(st.integers(1, 24))
    masks = _masks(n, data.draw)
    split, x = split_of(1, masks), ops.step_input("x", (2, n), F32)
    edges = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=4))})
    parts = [ops.slice_(x, axis=1, start=a, stop=b) for a, b in pairwise(edges)]
    states = [result(part, [split]) for part in parts]
    found = [state.masks() for state in states if isinstance(state, Split)]
    np.testing.assert_array_equal(np.concatenate(found), masks)
    asked = [
        needs(part, state)[0]
        for part, state in zip(parts, states, strict=True)
        if isinstance(state, Split) and state.masks().any()
    ]
    together = np.zeros(n, np.int64)
    for each in asked:
        assert isinstance(each, Split)
        assert not (together & each.masks()).any(), "two slices ask for the same"
        together |= each.masks()
    np.testing.assert_array_equal(together, masks)


def test_heads_of_a_cache_rotation_come_back():
    """Heads flattened with tokens into rows repeat once a token; the next reshape undoes it."""
    heads = normal(1, [((0,), 2), ((1,), 3)])
    x = ops.step_input("x", (7, 5, 64), F32)
    rows = ops.reshape(x, shape=(35, 64))
    flat = result(rows, [heads])
    assert flat == normal(0, [((0,), 2), ((1,), 3)], 7) and str(flat) == "axis 0: 2@0 3@1 x7"
    assert result(ops.reshape(rows, shape=(7, 5, 64)), [flat]) == heads


def test_a_fused_projection_is_six_runs():
    """q, k and v of two devices in one axis: slices of it are split as heads are."""
    widths = {"q": (4, 2), "k": (2, 1), "v": (2, 1)}
    fused = normal(1, [((d,), n) for each in widths.values() for d, n in enumerate(each)])
    assert len(fused.runs) == 6
    x, at = ops.step_input("x", (3, 12), F32), 0
    for each in widths.values():
        part = ops.slice_(x, axis=1, start=at, stop=at + sum(each))
        assert result(part, [fused]) == even(1, each)
        at += sum(each)


def test_what_would_move_elements_is_refused_with_the_reason():
    x = ops.step_input("x", (4, 6), F32)
    with pytest.raises(Unsplittable, match="reshape would move elements of axis 0: 3@0 5@1"):
        needs(ops.reshape(x, shape=(8, 3)), even(0, (3, 5)))
    with pytest.raises(Unsplittable, match="reshape of inputs that are axis 1: 4@0 2@1"):
        result(ops.reshape(x, shape=(8, 3)), [even(1, (4, 2))])
