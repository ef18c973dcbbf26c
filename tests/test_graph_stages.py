"""Graphs cut into stages: random ones compute the same, models are cut at the residual stream."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import NOVEL, Sizes, write_model
from stored_tensors import Stored, file_of

import runtime
from runtime import ops
from runtime.backends.meta.graph_stages import StagedGraph, cut_graph
from runtime.backends.meta.layers import LayersBackend
from runtime.backends.reference import ReferenceBackend
from runtime.model import Model
from runtime.ops.dtypes import F32
from runtime.ops.errors import OptionError
from runtime.ops.registry import Kind, kind_of
from runtime.ops.tensor import LEAVES, Tensor

WIDTH, ROOM, LIVE, OUTPUTS = 32, 6, 5, 2
RNG = np.random.default_rng(4)
INPUTS = {
    "x": RNG.standard_normal((LIVE, WIDTH)), "ids": RNG.integers(0, 9, LIVE),
    "kv_slots": np.arange(LIVE), "block_table": np.zeros((1, 1), np.int32),
    "sequences": np.zeros(LIVE, np.int32), "places": np.arange(LIVE), "wanted": np.array([4, 1]),
}  # fmt: skip
T, R = ops.Dim("tokens", ROOM), ops.Dim("outputs", OUTPUTS)
STEP = {name: ops.step_input(name, (T,)) for name in ("ids", "kv_slots", "sequences", "places")}
STEP["block_table"] = ops.step_input("block_table", (ROOM, 1))
STEP["wanted"] = ops.step_input("wanted", (R,))
STEP["x"] = ops.step_input("x", (T, WIDTH), F32)


class Builder:
    """A graph of rows [T, WIDTH], node by node; `weights` are the tensors of its file."""

    def __init__(self) -> None:
        self.weights: dict[str, Stored] = {}
        self.rows = [STEP["x"]]
        self.written: list[Tensor] = []

    def weight(self, *shape: int) -> Tensor:
        name = str(len(self.weights))
        self.weights[name] = Stored(RNG.standard_normal(shape).astype(np.float32))
        return ops.weight(name, shape, F32)

    def add(self, kind: str, first: int, second: int) -> None:
        """One more, of two rows there are."""
        x, y = (self.rows[i % len(self.rows)] for i in (first, second))
        if kind == "matmul":
            made = ops.matmul(x, self.weight(WIDTH, WIDTH))
        elif kind == "norm":
            made = ops.rms_norm(x, self.weight(WIDTH), eps=1e-5)
        elif kind == "embed":
            made = ops.get_rows(self.weight(9, WIDTH), STEP["ids"])
        elif kind == "shift":
            made = ops.mul(x, ops.constant("c", np.full(WIDTH, 0.5, np.float32)))
        elif kind == "part":
            halves = [ops.slice_(x, axis=1, start=at, stop=at + 16) for at in (0, 16)]
            made = ops.merge_heads(ops.copy(ops.split_heads(ops.mul(*halves), 1)))
            made = ops.matmul(made, self.weight(WIDTH, 16))
        elif kind == "attend":
            made = self.attend(x, y)
        else:
            made = ops.OPS[kind](x, y)
        self.rows.append(made)

    def attend(self, x: Tensor, y: Tensor) -> Tensor:
        n, held = len(self.written), []
        for which, rows in (("k", y), ("v", x)):
            leaf = ops.state(f"{n}{which}", (2, ops.PAGE, 1, WIDTH), F32, which)
            rows = ops.split_heads(rows, 1)
            held.append(ops.kv_write(rows, leaf, STEP["kv_slots"], which=which, kv="f32"))
        self.written += held
        seen = (STEP[name] for name in ("block_table", "sequences", "places"))
        return ops.merge_heads(ops.attention(ops.split_heads(x, 1), *held, *seen, scale=0.1))


KINDS = ("matmul", "norm", "embed", "shift", "part", "attend", "add", "mul")
NODES = st.tuples(st.sampled_from(KINDS), st.integers(0, 99), st.integers(0, 99))


@st.composite
def drawn_graphs(draw: st.DrawFn) -> tuple[ops.Graph, dict[str, Stored], list[float]]:
    made = Builder()
    for node in draw(st.lists(NODES, min_size=2, max_size=14)):
        made.add(*node)
    outputs = [made.rows[-1]]
    outputs += draw(st.lists(st.sampled_from(made.rows[1:]), max_size=2))
    outputs += draw(st.lists(st.sampled_from(made.written), max_size=1)) if made.written else []
    if draw(st.booleans()):
        outputs.append(ops.select_rows(made.rows[-1], STEP["wanted"]))
    if draw(st.booleans()):
        outputs.append(ops.slice_(made.rows[-1], axis=1, start=3, stop=9))
    shares = draw(st.lists(st.floats(0.01, 10), min_size=1, max_size=5))
    return ops.Graph(tuple(outputs)), made.weights, shares


def cut_or_fewer(graph: ops.Graph, shares: list[float]) -> tuple[StagedGraph, list[float]]:
    """Into as many stages as there can be of those shares."""
    while True:
        try:
            return cut_graph(graph, shares), shares
        except OptionError:
            shares = shares[1:]


@settings(max_examples=150, deadline=None)
@given(drawn_graphs())
def test_stages_compute_what_the_graph_does(drawn: tuple[ops.Graph, dict[str, Stored], list]):
    graph, weights, shares = drawn
    cut, shares = cut_or_fewer(graph, shares)
    check_stages(graph, cut)
    file, live = file_of(weights), {"tokens": LIVE, "outputs": OUTPUTS}
    whole = ReferenceBackend(file)
    layers = LayersBackend([ReferenceBackend(file) for _ in shares], shares)
    for _ in range(2):  # the second step finds the state of the first
        wanted = whole.program(graph).run(INPUTS, live)
        for run in (layers.program(graph).run, lambda *step: streamed(layers, graph, *step)):
            got = run(INPUTS, live)
            assert len(got) == len(wanted)
            for x, y in zip(got, wanted, strict=True):
                np.testing.assert_array_equal(x, y)
    for leaf in graph.leaves("state"):
        np.testing.assert_array_equal(layers.read_state(leaf, [0]), whole.read_state(leaf, [0]))
    layers.close()


def streamed(layers: LayersBackend, graph: ops.Graph, inputs, live):
    """The outputs of the last of several steps at a time."""
    program = layers.program(graph)
    return list(layers.stream([(program, inputs, live)] * 4))[-1]


def check_stages(graph: ops.Graph, cut: StagedGraph) -> None:
    """Each node that reads weights or states is in one stage, each state too; floats cross."""
    inputs = {x.name for x in graph.leaves("input")}
    handed: set[str] = set()
    counts: dict[tuple, int] = {}
    held: set[str] = set()
    for stage in cut.stages:
        states = {x.name for x in stage.graph.leaves("state")}
        assert not states & held
        held |= states
        for x in stage.graph.leaves("input"):
            assert x.name in inputs or (x.name in handed and x.dtype is F32)
        handed |= set(stage.results)
        for node in stage.graph.nodes:
            if any(x.op in ("weight", "state") for x in node.inputs):
                key = node.op, *(x.name for x in node.inputs if x.op in ("weight", "state"))
                counts[key] = counts.get(key, 0) + 1
    assert set(counts.values()) <= {1}
    assert held == {x.name for x in graph.leaves("state")}


ARCHITECTURES = {
    "qwen3": Sizes(layers=6), "qwen3moe": Sizes("qwen3moe", layers=4, experts=6, inner=32),
    **{name: NOVEL[name] for name in ("qwen35", "qwen35moe", "qwen3next", "gpt-oss")},
}  # fmt: skip


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("stages") / f"{request.param}.gguf"
    return runtime.load(write_model(path, ARCHITECTURES[request.param]), devices="null")


def weights_and_states(cut: StagedGraph) -> list[tuple[list[str], list[str]]]:
    leaves = [[s.graph.leaves(kind) for kind in ("weight", "state")] for s in cut.stages]
    return [([x.name for x in w], [x.name for x in s]) for w, s in leaves]


@pytest.mark.parametrize("shares", [[1, 1], [3, 1], [1, 2, 1], [1, 9]])
def test_graphs_of_all_capacities_are_cut_alike(model: Model, shares: list[float]):
    graphs = model._engine.graphs
    sizes = [(1, 1), (2, 1), (16, 1), (16, 16), (512, 8), (64, 1, True)]
    cuts = [weights_and_states(cut_graph(graphs.graph(*size), shares)) for size in sizes]
    assert len({str(cut) for cut in cuts}) == 1


def test_little_crosses_where_there_are_layers_enough(model: Model):
    """One tensor, as wide as the residual stream, and no other between any two stages."""
    hidden = model._engine.architecture.p.hidden
    for shares in ([1, 1], [2, 1], [1, 1, 1]):
        cut = cut_graph(model.graph(8, 1), shares)
        for stage in cut.stages[:-1]:
            (name,) = stage.results
            assert [x.shape for x in stage.graph.outputs] == [(8, hidden)], name
            assert isinstance(stage.graph.outputs[0].shape[0], ops.Dim)


def renamed(graph: ops.Graph) -> ops.Graph:
    made: dict[Tensor, Tensor] = {}
    for n, node in enumerate(graph.nodes):
        inputs = tuple(made[x] for x in node.inputs)
        made[node] = Tensor(node.op, inputs, node.shape, node.dtype, node.attrs, str(n))
    return ops.Graph(tuple(made[o] for o in graph.outputs))


def test_names_mean_nothing(model: Model):
    graph = model.graph(8, 1)
    cuts = [cut_graph(g, [1, 2, 1]) for g in (graph, renamed(graph))]
    one, other = ([len(s.graph.nodes) for s in cut.stages] for cut in cuts)
    assert one == other


def held(graph: ops.Graph) -> int:
    return sum(x.nbytes for x in graph.leaves("weight"))


@pytest.mark.parametrize("shares", [[1, 1], [3, 1], [5, 3], [1, 1, 1, 1], [1, 2, 3, 4], [1, 9]])
def test_shares_of_bytes_are_those_asked_for(shares: list[float], tmp_path: Path):
    """Within a granule, which is half a layer; there is little beside layers."""
    size = Sizes(layers=24, vocabulary=8)
    model = runtime.load(write_model(tmp_path / "m.gguf", size), devices="null", context=64)
    graph = model.graph(1, 1)
    granule = held(graph) / 24 * 0.6
    cut = cut_graph(graph, shares)
    for stage, share in zip(cut.stages, shares, strict=True):
        assert abs(held(stage.graph) - share / sum(shares) * held(graph)) <= granule


def chain(n: int) -> ops.Graph:
    made = Builder()
    for i in range(n):
        made.add("matmul", i, 0)
    return ops.Graph((made.rows[-1],))


def test_more_devices_than_stages():
    assert len(cut_graph(chain(4), [1] * 4).stages) == 4
    with pytest.raises(OptionError, match=r"5 devices.* cut into 4 stages: give at most 4 devices"):
        cut_graph(chain(4), [1] * 5)
    with pytest.raises(OptionError, match="at most 1 device"):
        cut_graph(ops.Graph((ops.silu(STEP["x"]),)), [1, 1])


def test_a_narrow_place_is_taken_where_it_lies_well_and_no_other():
    """WIDTH numbers cross anywhere but behind the second of twelve layers, where 16 do."""
    made = Builder()
    for n in range(12):
        made.add("matmul", n, 0)
        if n in (1, 6):
            narrow = ops.matmul(made.rows[-1], made.weight(4, WIDTH))
            made.rows[-1] = ops.matmul(narrow, made.weight(WIDTH, 4))
    cut = cut_graph(ops.Graph((made.rows[-1],)), [1, 1])
    assert [len(s.graph.leaves("weight")) for s in cut.stages] == [10, 6]
    assert cut.stages[0].graph.outputs[0].shape == (ROOM, 4)


def test_what_is_cheap_is_made_again(model: Model):
    """Nothing made of step inputs and constants alone crosses; each stage has its own."""
    graph = model.graph(8, 1)
    angles = [x for x in graph.nodes if x.op == "rope_angles"]
    parts = [s.graph for s in cut_graph(graph, [1, 1]).stages]
    users = [any(x.op == "attention" for x in part.nodes) for part in parts]
    assert [any(x.op == "rope_angles" for x in part.nodes) for part in parts] == users
    assert len(angles) == 1


def test_work_is_done_once(model: Model):
    """But for views and for what is cheap, the stages have the nodes of the graph and no more."""
    graph = model.graph(8, 1)

    def count(graphs: list[ops.Graph]) -> int:
        kinds = (
            kind_of(x) for g in graphs for x in g.nodes if x.op not in (*LEAVES, "rope_angles")
        )
        return sum(kind is not Kind.VIEW for kind in kinds)

    assert count([graph]) == count([s.graph for s in cut_graph(graph, [1, 1, 1]).stages])
