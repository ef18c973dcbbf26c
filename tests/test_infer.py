"""Graphs split over devices by what `infer` says give what they give undivided, states included."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lockstep import Memory, run_together
from random_graphs import TOKENS, RandomGraph
from small_models import NOVEL, Sizes, write_model
from test_split_graphs import compare

import runtime
from runtime.backends.meta import shard as shard_module
from runtime.backends.meta.infer import Layout, infer
from runtime.backends.meta.shard import _Shard, shards
from runtime.backends.passes.fuse_collectives import fuse_residuals
from runtime.backends.passes.prepare import choose_rows
from runtime.backends.reference import ReferenceBackend, ReferenceProgram
from runtime.gguf.reader import open_gguf
from runtime.models.registry import build
from runtime.models.step import Step
from runtime.ops import Graph
from runtime.ops.cuts import cut_array
from runtime.ops.errors import OpError
from runtime.ops.splits import Routed, Split, State
from runtime.ops.tensor import LEAVES, Tensor, stored_name
from runtime.ops.views import slice_

SHARES = st.lists(st.sampled_from([1.0, 1.0, 2.0, 3.0, 9.0, 0.05]), min_size=1, max_size=5)


def _check_random(
    made: RandomGraph, shares: list[float], across: bool | None = None, exact: bool = False
) -> Layout:
    layout = infer(made.graph, shares, across, exact)
    whole, after = made.whole()
    memory = Memory(len(shares), lambda leaf: made.values[leaf.name])

    def leaf(device: int, node: Tensor) -> np.ndarray:
        if node.op == "state":
            return memory.part(device, node)
        if node.op == "constant":
            return node.attrs["value"]
        return cut_array(made.values[stored_name(node)], node.attrs.get("cut", ()))

    local = shards(layout)
    if len(shares) % 2:  # as programs have them
        local = fuse_residuals(local)
    outputs = run_together(local, leaf, {"tokens": TOKENS})
    wanted = [whole[o] for o in made.graph.outputs if o.base.op != "state"]
    for found in outputs:
        for got, want, same in zip(found, wanted, outputs[0], strict=True):
            compare(got, want, made.graph)
            np.testing.assert_array_equal(got, same)
    for state in made.graph.leaves("state"):
        found = memory.joined(layout, state)
        kept = ~np.isnan(found)  # nobody may have what nothing needs
        compare(found[kept], after[state.name][kept], state)
    return layout


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(10, 30), SHARES, st.sampled_from([None, True, False]))
def test_random_graphs(seed: int, size: int, shares: list[float], across: bool | None):
    _check_random(RandomGraph(seed, size), shares, across)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(10, 30), SHARES)
def test_random_graphs_without_sums(seed: int, size: int, shares: list[float]):
    assert not _check_random(RandomGraph(seed, size), shares, exact=True).sums


# Wrong parts: each must turn random graphs red.


def _whole_slices(right: Callable[..., Any], local: Any, node: Tensor) -> dict[str, Any]:
    return dict(node.attrs) if node.op == "slice" else right(local, node)


def _beginning(of: str) -> Callable[..., Tensor]:
    def cut(right: Callable[..., Tensor], leaf: Tensor, axis: int, runs: Any) -> Tensor:
        length = sum(stop - start for start, stop in runs)
        return right(leaf, axis, ((0, length),) if leaf.op == of else runs)

    return cut


def _from_zero(right: Any, local: Any, x: Tensor, use: Split) -> Tensor | None:
    size = use.local(local.device)
    if x.op in LEAVES or not size:
        return right(local, x, use)
    return slice_(x, axis=use.axis, start=0, stop=size)


FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "slices at places of the whole": (_Shard, "_attrs", _whole_slices),
    "weights cut at their beginning": (shard_module, "cut_leaf", _beginning("weight")),
    "states cut at their beginning": (shard_module, "cut_leaf", _beginning("state")),
    "parts taken from the beginning": (_Shard, "_part", _from_zero),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_part_is_caught(name: str, monkeypatch: pytest.MonkeyPatch):
    where, what, wrong = FAULTS[name]
    right = getattr(where, what)
    monkeypatch.setattr(where, what, lambda *args: wrong(right, *args))
    with pytest.raises((AssertionError, OpError)):
        for seed in range(100):
            _check_random(RandomGraph(seed, 20), [1, 1, 1])


# Models: the steps of the engine on the reference backend, done again by devices together.

SIZES = {
    "llama": Sizes("llama", heads=6, kv_heads=3), "qwen2": Sizes("qwen2", heads=7, kv_heads=1),
    "qwen3": Sizes("qwen3", heads=6, kv_heads=2), **NOVEL,
    "qwen3moe": Sizes("qwen3moe", experts=6, inner=32),
    "wide": Sizes("qwen35", layers=2, key_heads=3, value_heads=9, heads=8, kv_heads=4),
}  # fmt: skip
UNEVEN = [[3, 1], [1, 9], [1, 1, 1], [1, 0.01, 2], [1] * 5]
GOLDEN = ["gptoss", "llama", "qwen2", "qwen3", "qwen35", "qwen35moe", "qwen3moe", "qwen3next"]


class Done(NamedTuple):
    """A step that a model made."""

    graph: Graph
    inputs: Mapping[str, np.ndarray]
    live: Mapping[str, int]
    outputs: list[np.ndarray]


class Recorder(ReferenceBackend):
    """A reference backend that remembers its steps, and what states hold in the end."""

    def __init__(self, file: object) -> None:
        super().__init__(file)
        self.steps: list[Done] = []
        self.left: dict[str, np.ndarray] = {}

    def program(self, graph: Graph) -> ReferenceProgram:
        made = super().program(graph)
        run = made.run

        def recorded(inputs: Mapping[str, np.ndarray], live: Mapping[str, int]) -> list[np.ndarray]:
            kept = {name: np.array(value) for name, value in inputs.items()}
            self.steps.append(Done(graph, kept, dict(live), run(inputs, live)))
            self.left = {leaf.name: self.state(leaf).copy() for leaf in graph.leaves("state")}
            return self.steps[-1].outputs

        made.run = recorded  # type: ignore[method-assign]
        return made


def _recorded(path: Path, patch: pytest.MonkeyPatch) -> Recorder:
    """Two sequences: prompts, and then tokens of both together."""
    patch.setattr("runtime.model.open_backend", lambda devices, file, *_, **__: Recorder(file))
    with runtime.load(path, kv_type="f32", context=64, sequences=2) as model:
        first, second = model.session(), model.session()
        first.eval([3, 1, 4, 1, 5])
        model.step([(first, [9]), (second, [2, 6, 5])])
        model.step([(first, [3]), (second, [5])], logits="last")
        assert isinstance(model.backend, Recorder)
        return model.backend


def _replay(path: Path, recorder: Recorder, shares: list[float]) -> None:
    """The same steps on devices: the same logits and states."""
    backend, layouts = ReferenceBackend(open_gguf(path)), dict[str, Layout]()
    memory = Memory(len(shares), lambda leaf: np.zeros(leaf.attrs.get("whole", leaf.shape)))
    for graph, inputs, live, outputs in recorder.steps:
        if graph.key() not in layouts:
            layouts[graph.key()] = infer(choose_rows(graph), shares)
        layout = layouts[graph.key()]

        def leaf(device: int, node: Tensor, inputs: Mapping = inputs) -> np.ndarray:
            if node.op == "state":
                return memory.part(device, node)
            if node.op == "weight":
                return backend.weight(node)
            return node.attrs["value"] if node.op == "constant" else inputs[node.name]

        for found in run_together(fuse_residuals(shards(layout)), leaf, live):
            for got, want in zip(found, outputs, strict=True):
                assert nmse(got, want) <= 1e-20
    for state in layout.graph.leaves("state"):
        assert nmse(memory.joined(layout, state), recorder.left[state.name]) <= 1e-14


def nmse(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(((got - wanted) ** 2).sum() / max(1e-300, (wanted**2).sum()))


@pytest.mark.parametrize("name", SIZES)
def test_models(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_model(tmp_path / "m.gguf", SIZES[name])
    recorder = _recorded(path, monkeypatch)
    assert len(recorder.steps) >= 3
    for shares in UNEVEN:
        _replay(path, recorder, shares)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_models(name: str, golden: Path, monkeypatch: pytest.MonkeyPatch):
    path = golden / name / "model-f32.gguf"
    recorder = _recorded(path, monkeypatch)
    for shares in ([3, 1], [1, 0.1, 2]):
        _replay(path, recorder, shares)


# What the pass decides: the same for equal graphs, whatever things are called; few collectives.


def _graph(file: object, tokens: int, outputs: int = 1, kv_type: str = "f16") -> Graph:
    model = build(file)
    return choose_rows(model.graph(Step.capacity(
        tokens, outputs, 4, 8, 3, model.layers, (kv_type, kv_type), model.positions_per_token
    )))  # fmt: skip


def _decided(layout: Layout) -> list[tuple[str, list[State], int]]:
    """Of each node, in order, how it lies and how it takes its inputs."""

    def plain(state: State) -> State:  # without the node that says which experts
        return state.experts if isinstance(state, Routed) else state

    return [
        (n.op, [*map(plain, (layout.states[n], *layout.uses[n]))], layout.holders[n])
        for n in layout.graph.nodes
    ]


def _numbered(graph: Graph) -> Graph:
    """The graph with numbers in the place of all names."""
    made: dict[Tensor, Tensor] = {}
    for number, node in enumerate(graph.nodes):
        attrs = dict(node.attrs) | ({"of": str(number)} if "of" in node.attrs else {})
        inputs = tuple(made[x] for x in node.inputs)
        made[node] = replace(node, inputs=inputs, attrs=MappingProxyType(attrs), name=str(number))
    return Graph(tuple(made[o] for o in graph.outputs))


@pytest.fixture(params=[*SIZES, *(f"golden {name}" for name in GOLDEN)])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[object]:
    if request.param in SIZES:
        yield open_gguf(write_model(tmp_path / "m.gguf", SIZES[request.param]))
    else:
        golden: Path = request.getfixturevalue("golden")
        yield open_gguf(golden / request.param.split()[1] / "model-f32.gguf")


@pytest.mark.parametrize("shares", [[1, 1], [1, 5, 2]], ids=str)
def test_names_decide_nothing(file: object, shares: list[float]):
    layout = infer(_graph(file, 8), shares)
    assert _decided(infer(_graph(file, 8), shares)) == _decided(layout)
    assert _decided(infer(_numbered(_graph(file, 8)), shares)) == _decided(layout)


def test_every_capacity_is_split_alike(file: object):
    """So that steps of any size find weights and states where others left them."""

    def leaves(tokens: int, outputs: int) -> dict[str, object]:
        found = [graph.nodes for graph in shards(infer(_graph(file, tokens, outputs), [3, 1, 2]))]
        return {
            f"{device} {leaf.name}": (tuple(leaf.shape), leaf.attrs.get("cut"))
            for device, nodes in enumerate(found)
            for leaf in nodes if leaf.op in ("weight", "state")
        }  # fmt: skip

    first = leaves(1, 1)
    for tokens, outputs in ((2, 2), (8, 1), (64, 8), (512, 512)):
        assert leaves(tokens, outputs) == first


@pytest.mark.parametrize("devices", [2, 3])
def test_two_sums_a_layer_and_one_gather(file: object, devices: int):
    model = build(file)
    layout = infer(_graph(file, 4), [1] * devices)
    assert len(layout.sums) == 2 * len({*model.layers.attention, *model.layers.recurrent})
    assert len(layout.gathers) == 1
    whole = {w.name for w in layout.why if w.ndim > 1}
    assert all(re.fullmatch(r"token_embd.weight|blk.*gate_inp(_shexp)?.weight", n) for n in whole)


def test_no_sum_where_bits_must_be_those_of_one_device(file: object):
    """Two gathers for each sum, and one more where a mixture has a shared expert."""
    model, graph = build(file), _graph(file, 4)
    layout = infer(graph, [1, 1], exact=True)
    shared = sum("ffn_down_shexp" in w.name for w in graph.leaves("weight"))
    layers = len({*model.layers.attention, *model.layers.recurrent})
    assert (len(layout.sums), len(layout.gathers)) == (0, 4 * layers + shared + 1)


KINDS = ["Q8_0", "Q4_0", "Q4_K_M"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, k) for name in ("qwen3", "qwen3next", "qwen35moe") for k in KINDS],
)
def test_blocks_of_quantised_weights_stay_whole(name: str, kind: str, golden: Path):
    graph = _graph(open_gguf(golden / name / f"model-{kind}.gguf"), 2, kv_type="q8_0")
    for shares in UNEVEN:
        for each in shards(infer(graph, shares)):
            for leaf in each.leaves("weight"):
                runs = dict(leaf.attrs.get("cut", ())).get(len(leaf.attrs.get("whole", ())) - 1, ())
                assert not any(at % leaf.dtype.block for run in runs for at in run)
