"""Graphs from launches and edges: which edges are found, and which missing ones are noticed."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from fake_gpu import NBYTES, NORM, NUMBERS, ROWS, Gpu, N, normed

from runtime.backends.cuda.accesses import accesses
from runtime.backends.cuda.catalogue import KERNELS
from runtime.backends.cuda.graphs import Edge, Graph, chain, conflict, dependencies, spans
from runtime.ops.errors import BackendError


def _pairs(edges: list[Edge]) -> list[tuple[int, int]]:
    return [(edge.before, edge.after) for edge in edges]


def test_branches_run_side_by_side_and_join():
    gpu = Gpu()
    a, b, c, d, e = gpu.buffers(5)
    launches = [gpu.norm(a, b), gpu.norm(b, c), gpu.norm(b, d), gpu.norm(c, e), gpu.norm(d, a)]
    assert _pairs(dependencies(launches)) == [(0, 1), (0, 2), (1, 3), (2, 4)]


def test_a_writer_waits_for_readers_and_writers():
    gpu = Gpu()
    a, b, c = gpu.buffers(3)
    assert _pairs(dependencies([gpu.norm(a, b), gpu.norm(c, a)])) == [(0, 1)]
    assert _pairs(dependencies([gpu.norm(a, b), gpu.norm(c, b)])) == [(0, 1)]
    assert _pairs(dependencies([gpu.norm(a, b), gpu.norm(a, c)])) == []


def test_parts_of_a_buffer_are_apart():
    gpu = Gpu()
    (a, b), wide = gpu.buffers(2), gpu.arena.take(2 * NBYTES)
    first, second = wide.view(0, NBYTES), wide.view(NBYTES)
    assert dependencies([gpu.norm(a, first), gpu.norm(second, b)]) == []
    assert len(dependencies([gpu.norm(a, first), gpu.norm(wide, b)])) == 1


@pytest.mark.parametrize("seed", range(5))
def test_edges_are_enough_and_none_is_needless(seed: int):
    gpu, generator = Gpu(), random.Random(seed)
    buffers = gpu.buffers(6)
    launches = [gpu.norm(*generator.sample(buffers, 2)) for _ in range(14)]
    pairs = _pairs(dependencies(launches))
    touched = [spans(launch) for launch in launches]
    for i, j in itertools.combinations(range(len(launches)), 2):
        if conflict(touched[i], touched[j]):
            assert _reaches(pairs, i, j)
    for pair in pairs:
        assert not _reaches([p for p in pairs if p != pair], *pair)
        with pytest.raises(BackendError, match="no edges lead from"):
            Graph(gpu.device, launches, [Edge(*p) for p in pairs if p != pair])


def _reaches(pairs: list[tuple[int, int]], start: int, end: int) -> bool:
    reached = {start}
    for before, after in sorted(pairs):
        if before in reached:
            reached.add(after)
    return end in reached


def test_replays_equal_launches_one_by_one(rng):
    """Nodes run in random orders that the edges allow."""
    gpu = Gpu(execute=True)
    x = rng.standard_normal((ROWS, N)).astype(np.float32)
    a, (b, c, d, e) = gpu.upload(x), gpu.buffers(4)
    launches = [gpu.norm(a, b), gpu.norm(b, c), gpu.norm(b, d), gpu.norm(c, e), gpu.norm(d, a)]
    for launch in launches:
        launch.run(gpu.stream)
    eager = [gpu.values(buffer) for buffer in (a, b, c, d, e)]
    with Graph(gpu.device, launches) as graph:
        for _ in range(4):
            a.write(x, gpu.stream)
            for buffer in (b, c, d, e):
                buffer.fill(0xCD, gpu.stream)
            graph.replay(gpu.stream)
            for buffer, expected in zip((a, b, c, d, e), eager, strict=True):
                np.testing.assert_array_equal(gpu.values(buffer), expected)
    np.testing.assert_allclose(eager[1], normed(x), rtol=1e-6)


def test_a_graph_keeps_its_arguments_until_the_update():
    gpu = Gpu(execute=True)
    x = np.arange(ROWS * N, dtype=np.float32).reshape(ROWS, N)
    source, out = gpu.upload(x), gpu.upload(np.zeros_like(x))
    launch = gpu.norm(source, out)
    with Graph(gpu.device, [launch]) as graph:
        launch.set(x=gpu.upload(x[::-1]))
        launch.set_grid(1)
        graph.replay(gpu.stream)
        np.testing.assert_allclose(gpu.values(out), normed(x), rtol=1e-6)
        graph.update(0)
        graph.replay(gpu.stream)
        np.testing.assert_allclose(gpu.values(out), normed(x)[[1, 1]], rtol=1e-6)


def test_an_update_may_not_break_the_order():
    gpu = Gpu()
    a, b, c, d = gpu.buffers(4)
    launches = [gpu.norm(a, b), gpu.norm(c, d)]
    with Graph(gpu.device, launches) as graph:
        launches[1].set(x=b)
        with pytest.raises(BackendError, match=r"no edges lead from .*node 0"):
            graph.update(1)


def test_an_updated_node_keeps_its_edges():
    gpu = Gpu()
    a, b, c = gpu.buffers(3)
    launches = [gpu.norm(a, b), gpu.norm(b, c)]
    with Graph(gpu.device, launches) as graph:
        launches[1].set(eps=0.5)
        graph.update(1)
        graph.update(1)
        graph.replay(gpu.stream)


def test_programmatic_edges_where_one_launch_follows_another():
    gpu = Gpu()
    a, b, c, d = gpu.buffers(4)
    launches = [gpu.norm(a, b), gpu.norm(b, c), gpu.norm(b, d), gpu.norm(d, c)]
    edges = dependencies(launches, programmatic=True)
    assert [(e.before, e.after, e.programmatic) for e in edges] == [
        (0, 1, True), (0, 2, True), (1, 3, False), (2, 3, False),
    ]  # fmt: skip
    Graph(gpu.device, launches, edges).replay(gpu.stream)


def test_what_a_kernel_reads_before_it_waits_is_done_before_it_begins():
    """A norm reads its weight as unchanging, so it may not begin while that is being written.

    Waiting for launch 1 alone is not enough: it begins, and lets launch 2 begin, when 0 begins.
    """
    gpu = Gpu()
    a, w, b, c, d, e = gpu.buffers(6)

    def norm(x, weight, out):
        return gpu.device.launch(NORM, ROWS, x, weight, out, *NUMBERS)

    assert accesses(NORM).early == {"w"}
    launches = [gpu.norm(a, w), gpu.norm(w, b), norm(b, w, c), gpu.norm(c, d), norm(d, w, e)]
    edges = dependencies(launches, programmatic=True)
    assert [(e.before, e.after, e.programmatic) for e in edges] == [
        (0, 1, True), (1, 2, False), (2, 3, True), (3, 4, True),
    ]  # fmt: skip
    Graph(gpu.device, launches, edges).replay(gpu.stream)
    with pytest.raises(BackendError, match=r"\(node 2\) uses before its launch_wait.*\(node 0\)"):
        Graph(gpu.device, launches, chain(5, programmatic=True))
    direct = [gpu.norm(a, w), norm(b, w, c)]
    assert not dependencies(direct, programmatic=True)[0].programmatic


def test_no_kernel_writes_what_it_takes_for_unchanging():
    for kernel in KERNELS.every():
        used = accesses(kernel)
        assert not used.unchanging & used.writes, kernel


def test_a_kernel_that_does_not_wait_has_no_programmatic_edge(monkeypatch):
    import dataclasses

    import fake_driver

    from runtime.backends.cuda import graphs

    def hasty(kernel):
        return dataclasses.replace(accesses(kernel), waits=False)

    accesses = graphs.accesses
    gpu = Gpu()
    a, b, c = gpu.buffers(3)
    launches = [gpu.norm(a, b), gpu.norm(b, c)]
    graph = gpu.driver.create_graph()
    first = gpu.driver.add_node(graph, launches[0], [], [])
    monkeypatch.setattr(graphs, "accesses", hasty)
    monkeypatch.setattr(fake_driver, "accesses", hasty)
    assert not dependencies(launches, programmatic=True)[0].programmatic
    with pytest.raises(BackendError, match="has no launch_wait"):
        Graph(gpu.device, launches, chain(2, programmatic=True))
    with pytest.raises(BackendError, match="no launch_wait"):
        gpu.driver.add_node(graph, launches[1], [first], [True])
    with pytest.raises(BackendError, match="no launch_wait"):
        launches[1].run(gpu.stream, programmatic=True)


@pytest.mark.parametrize("edge", [Edge(1, 0), Edge(0, 0), Edge(0, 2), Edge(-1, 1)])
def test_edges_point_forward(edge: Edge):
    gpu = Gpu()
    a, b, c = gpu.buffers(3)
    with pytest.raises(BackendError, match="does not point forward among 2 launches"):
        Graph(gpu.device, [gpu.norm(a, b), gpu.norm(b, c)], [edge])


def test_two_edges_between_two_launches():
    gpu = Gpu()
    a, b, c = gpu.buffers(3)
    with pytest.raises(BackendError, match="two edges from 0 to 1"):
        Graph(gpu.device, [gpu.norm(a, b), gpu.norm(b, c)], [Edge(0, 1), Edge(0, 1, True)])


def test_a_graph_does_not_outlive_what_it_uses():
    gpu = Gpu()
    mark = gpu.arena.mark()
    a, b, c = gpu.buffers(3)
    graph = Graph(gpu.device, [gpu.norm(a, b), gpu.norm(b, c)])
    graph.replay(gpu.stream)
    gpu.arena.release(mark)
    with pytest.raises(BackendError, match="uses x after it was released"):
        graph.replay(gpu.stream)
    graph.close()
    graph.close()
    with pytest.raises(BackendError, match=r"executable .* was destroyed"):
        graph.replay(gpu.stream)


def test_a_graph_is_ordered_behind_other_streams():
    gpu = Gpu()
    (a, b, c), second = gpu.buffers(3), gpu.device.stream()
    graph = Graph(gpu.device, [gpu.norm(a, b), gpu.norm(b, c)])
    graph.replay(gpu.stream)
    with pytest.raises(BackendError, match="not ordered behind graph"):
        gpu.norm(c, a).run(second)


def test_three_hundred_launches_are_one_call():
    gpu = Gpu()
    a, b = gpu.buffers(2)
    launches = [gpu.norm(*((a, b) if i % 2 else (b, a))) for i in range(300)]
    graph = Graph(gpu.device, launches)
    assert graph.edges == chain(300)
    before = len(gpu.driver.calls)
    graph.replay(gpu.stream)
    assert len(gpu.driver.calls) == before + 1
