"""Sums and gathers over devices: the very numbers of their plain meaning, whoever has threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from split_by_hand import Network, devices, leaf

from runtime import ops
from runtime.backends.cpu import CpuBackend
from runtime.backends.cpu.rules import collective
from runtime.ops import Dim, Graph
from runtime.ops.collective import all_gather, all_sum, joined
from runtime.ops.errors import OpError

NETWORK = Network()
CUTS = {
    "even": ((80, 80), (40, 35)),
    "uneven": ((120, 40), (75, 0)),
    "odd lengths": ((3, 157), (1, 74)),
    "nothing on the first": ((0, 160), (0, 75)),
    "one alone": ((160, 0, 0), (0, 0, 75)),
    "five": ((32, 1, 0, 63, 64), (15, 15, 15, 15, 15)),
}


def run(
    cuts: Sequence[Sequence[int]],
    ids: np.ndarray,
    room: int,
    threads: Sequence[int],
    times: int = 1,
) -> np.ndarray:
    """The logits of the network, the same each time."""
    graphs = [NETWORK.graph(room, cuts, d) for d in range(len(cuts[0]))]
    with devices(threads, NETWORK.file, lambda graph: graphs) as backend:
        program = backend.program(NETWORK.graph(room))
        found = [program.run({"ids": ids}, {"tokens": len(ids)})[0].copy() for _ in range(times)]
    assert all(np.array_equal(found[0], other) for other in found)
    return found[0]


@pytest.fixture(params=[-1, 1 << 30], ids=["once for all", "each for itself"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to add up."""
    monkeypatch.setattr(collective, "ONCE_NBYTES", request.param)


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize(("room", "live"), [(1, 1), (8, 5), (32, 32)])
def test_a_split_network_is_the_network(way: None, name: str, room: int, live: int):
    ids = np.arange(live, dtype=np.int32) * 3 % 75
    backend = CpuBackend(NETWORK.file, 2)
    whole = backend.program(NETWORK.graph(room)).run({"ids": ids}, {"tokens": live})[0].copy()
    backend.close()
    found = run(CUTS[name], ids, room, [1] * len(CUTS[name][0]), 20)
    assert found.shape == whole.shape
    error = ((found - whole) ** 2).sum() / (whole**2).sum()
    assert error < 1e-12


def test_bits_depend_on_nothing_but_the_cut(monkeypatch: pytest.MonkeyPatch):
    ids = np.arange(7, dtype=np.int32)
    found = []
    for once in (-1, 1 << 30):
        monkeypatch.setattr(collective, "ONCE_NBYTES", once)
        for threads in ((1, 1), (3, 1), (1, 2)):
            found.append(run(CUTS["even"], ids, 8, threads, 3))
            found.append(run(CUTS["even"], ids, 32, threads))
    assert len({x.tobytes() for x in found}) == 1
    assert found[0].tobytes() != run(CUTS["uneven"], ids, 8, (1, 1)).tobytes()


def collected(op: Any, parts: Sequence[np.ndarray | None], live: int, **attrs: Any) -> None:
    """Every device's result of a collective of these inputs is what the op means, bit for bit."""
    room = attrs["shape"][0]
    values = {f"part{d}": x for d, x in enumerate(parts) if x is not None}
    nodes = [
        op(*([] if x is None else [leaf(f"part{d}", x)]), device=d, devices=len(parts), **attrs)
        for d, x in enumerate(parts)
    ]
    rows = slice(live if isinstance(room, Dim) else None)
    wanted = joined(nodes[0], parts)[rows]
    for first in range(len(parts)):  # results are those of the first device
        turned = [*nodes[first:], *nodes[:first]]
        graphs = [Graph((ops.scale(node, factor=1.0),)) for node in nodes]
        assert turned[0] is nodes[first]
        with devices([1] * len(parts), None, lambda graph, graphs=graphs: graphs) as backend:
            program = backend.program(graphs[0])
            program.run(values, {"tokens": live})
            got = program._programs[first].results({"tokens": live})[0]
            np.testing.assert_array_equal(got, wanted)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_sums_of_any_parts(data: st.DataObject):
    count, rows, n = (data.draw(st.integers(1, high)) for high in (4, 5, 70))
    holders = tuple(sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1))))
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    live = data.draw(st.integers(0, rows))
    parts = [
        rng.standard_normal((rows, n)).astype(np.float32) if d in holders else None
        for d in range(count)
    ]
    room = Dim("tokens", rows)
    collected(all_sum, parts, live, shape=(room, n), holders=holders, number=0)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_gathers_of_any_stretches(data: st.DataObject):
    count, axis, repeat = (data.draw(st.integers(*r)) for r in ((1, 4), (0, 2), (1, 3)))
    owners = st.lists(st.integers(0, count - 1), min_size=1, max_size=count, unique=True)
    runs = tuple(
        (tuple(data.draw(owners)), data.draw(st.integers(1, 5)))
        for _ in range(data.draw(st.integers(1, 4)))
    )
    shape = [data.draw(st.integers(1, 4)) for _ in range(3)]
    period = sum(n for _, n in runs)
    shape[axis] = repeat * period
    whole = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    place = np.arange(period)
    at = np.cumsum([0, *(n for _, n in runs)])
    parts = []
    for d in range(count):
        mine = [place[at[i] : at[i + 1]] for i, (who, _) in enumerate(runs) if d in who]
        every = [turn * period + np.concatenate(mine) for turn in range(repeat)] if mine else []
        parts.append(whole.take(np.concatenate(every), axis) if every else None)
    live, first = shape[0], shape[0]
    if axis:
        first, live = Dim("tokens", shape[0]), data.draw(st.integers(0, shape[0]))
    collected(
        all_gather, parts, live, shape=(first, *shape[1:]), axis=axis, runs=runs, repeat=repeat,
        number=0,
    )  # fmt: skip


def test_outputs_are_kept(way: None):
    """Whatever is summed after them."""
    x, graphs = leaf("x", np.ones((3, 50), np.float32)), []
    for device in range(2):
        sums = [x]
        for n in range(6):
            place: dict[str, Any] = {"holders": (0, 1), "device": device, "devices": 2}
            part = ops.scale(sums[-1], factor=1.0)
            sums.append(all_sum(part, shape=x.shape, number=n, **place))
        graphs.append(Graph(tuple(sums[1:])))
    with devices([1, 1], None, lambda graph: graphs) as backend:
        found = backend.program(graphs[0]).run({"x": np.ones((3, 50), np.float32)}, {})
        for n, total in enumerate(found):
            np.testing.assert_array_equal(total, np.full((3, 50), 2.0 ** (n + 1)))


def test_parts_that_do_not_fit_are_refused():
    x = leaf("x", np.zeros((2, 3), np.float32))
    places: dict[str, Any] = {"devices": 2, "number": 0}
    with pytest.raises(OpError, match=r"device 1 has no input"):
        all_sum(x, shape=(2, 3), holders=(0,), device=1, **places)
    with pytest.raises(OpError, match=r"device 0 has one input"):
        all_sum(shape=(2, 3), holders=(0,), device=0, **places)
    with pytest.raises(OpError, match=r"a part is float32"):
        all_sum(x, shape=(2, 4), holders=(0, 1), device=0, **places)
    runs = (((0,), 2), ((1,), 2))
    with pytest.raises(OpError, match=r"a part is \[2, 2\]"):
        all_gather(x, shape=(2, 4), axis=1, runs=runs, repeat=1, device=0, **places)
    with pytest.raises(OpError, match=r"is not axis 1"):
        all_gather(x, shape=(2, 5), axis=1, runs=runs, repeat=1, device=0, **places)
