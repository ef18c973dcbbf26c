"""Whole experts on one device each: what of a token goes where is known in the step alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lockstep import run_together
from small_models import Sizes, model_files
from split_parts import Unsound
from stored_tensors import Stored, file_of
from tensor_models import load_split
from test_dialects import DIALECTS, File

import runtime
from runtime import ops
from runtime.backends.cpu import CpuBackend
from runtime.backends.cpu.planner import options
from runtime.backends.meta.infer import Layout, infer
from runtime.backends.meta.shard import shards
from runtime.backends.passes.prepare import choose_rows, prepare
from runtime.backends.reference import ReferenceBackend
from runtime.gguf.reader import open_gguf
from runtime.models.registry import build
from runtime.models.step import Step
from runtime.ops import axes
from runtime.ops.dtypes import DTYPES, F32, I32
from runtime.ops.graph import Graph
from runtime.ops.registry import OPS, Kind
from runtime.ops.splits import MIRRORED, PARTIAL, Routed, Split, State, Unsplittable, split_of
from runtime.ops.tensor import Tensor, stored_name

# The rule, op by op: what devices compute from rows of their own experts, the others poisoned.

T, USED, N, EXPERTS, DEVICES = 7, 3, 6, 5, 3
IDS, OTHER = (ops.step_input(name, (T, USED), I32) for name in ("ids", "other"))


def _x(*shape: int) -> Tensor:
    return ops.step_input("x", shape, F32)


def _w(*shape: int) -> Tensor:
    return ops.weight("w", shape, F32)


ROWS = (T, USED, N)
# op -> its nodes, and the ways in which inputs may be: by (r)outed, (e)xperts split, whole (-)
NODES: dict[str, tuple[list[Tensor], str]] = {
    "matmul_id": (
        [ops.matmul_id(_x(T, N), _w(EXPERTS, 4, N), IDS),
         ops.matmul_id(_x(*ROWS), _w(EXPERTS, 4, N), IDS)], "-e- re-",
    ),
    "expert_bias": ([ops.expert_bias(_x(*ROWS), _w(EXPERTS, N), IDS)], "re- -e-"),
    "expert_sum": ([ops.expert_sum(_x(*ROWS), _x(T, USED))], "r-"),
    "add": ([ops.add(_x(*ROWS), _x(*ROWS)), ops.add(_x(*ROWS), _w(N))], "rr r- -r"),
    "mul": ([ops.mul(_x(*ROWS), _x(*ROWS)), ops.mul(_x(*ROWS), _w(N))], "rr r- -r"),
    "scale": ([ops.scale(_x(*ROWS), factor=2.0)], "r"),
    "row_scale": ([ops.row_scale(_x(*ROWS), _x(T, USED, 1))], "r- -r rr"),
    "silu": ([ops.silu(_x(*ROWS))], "r"),
    "sigmoid": ([ops.sigmoid(_x(*ROWS))], "r"),
    "softplus": ([ops.softplus(_x(*ROWS))], "r"),
    "swiglu_oai": ([ops.swiglu_oai(_x(*ROWS), _x(*ROWS), alpha=1.7, limit=7.0)], "rr r- -r"),
    "softmax": ([ops.softmax(_x(*ROWS))], "r"),
    "normalize": ([ops.normalize(_x(*ROWS))], "r"),
    "rms_norm": ([ops.rms_norm(_x(*ROWS), _w(N), eps=1e-6)], "r-"),
    "l2_norm": ([ops.l2_norm(_x(*ROWS), eps=1e-6)], "r"),
    "matmul": ([ops.matmul(_x(*ROWS), _w(4, N))], "r-"),
    "top_k": ([ops.top_k(_x(*ROWS), k=2)], "r"),
    # what is none: rows are mixed, moved, or of other numbers
    "reshape": ([ops.reshape(_x(*ROWS), shape=(T, USED * N))], ""),
    "permute": ([ops.permute(_x(*ROWS), axes=(1, 0, 2))], ""),
    "slice": ([ops.slice_(_x(*ROWS), axis=1, start=1, stop=3)], ""),
    "copy": ([ops.copy(_x(*ROWS))], ""),
    "select_rows": ([ops.select_rows(_x(*ROWS), ops.step_input("rows", (2,), I32))], ""),
    "take": ([ops.take(_x(T, USED), IDS)], ""),
    "renumber": ([ops.renumber(IDS, ops.step_input("n", (EXPERTS,), I32))], ""),
}  # fmt: skip


def _owners() -> Iterator[Split]:
    """Of each expert the device: in stretches, in turn, all of one, and two of one expert."""
    for owner in ([0, 0, 1, 1, 2], [2, 0, 2, 0, 2], [1] * EXPERTS, [0, 1, 2, 0, 0]):
        yield split_of(0, 1 << np.array(owner, np.int64))
    yield split_of(0, np.array([1, 3, 2, 4, 4], np.int64))


def _ways(node: Tensor, experts: Split) -> Iterator[tuple[str, list[State]]]:
    """All combinations of input states; rows are routed by the ids in question, or by others."""
    routes = [Routed(IDS, experts), Routed(OTHER, experts)]
    pools = [
        [MIRRORED, experts, *(routes if x.op == "input" and x.ndim > 2 else [])]
        for x in node.inputs
    ]
    for states in itertools.product(*pools):
        letters = "".join(
            "-" if s is MIRRORED else "r" if isinstance(s, Routed) else "e" for s in states
        )
        yield letters, list(states)


def soundness(name: str) -> set[str]:
    """The ways that the rule allows; Unsound where devices do not have what it says."""
    found, rng = set[str](), np.random.default_rng(0)
    for node, experts in itertools.product(NODES[name][0], _owners()):
        for letters, states in _ways(node, experts):
            with suppress(Unsplittable):
                state = axes.routed(node, states)
                _compare(node, states, state, rng)
                found.add(letters)
    return found


def _compare(node: Tensor, states: list[State], state: State, rng: np.random.Generator) -> None:
    ids = {which: rng.integers(0, EXPERTS, (T, USED)).astype(np.int32) for which in (IDS, OTHER)}
    values = [
        ids.get(x, rng.integers(0, 2, x.shape) if x.dtype is I32 else rng.random(x.shape) + 0.1)
        for x in node.inputs
    ]
    reference = np.errstate(invalid="ignore")(OPS[node.op].reference)
    whole, total = reference(*values, **node.attrs), 0
    way = next(s for s in [state, *states] if isinstance(s, Routed))
    if way.ids not in ids:
        raise Unsound(f"{node.op}: rows go by what are no experts")
    for device in range(DEVICES):
        here = way.experts.masks() >> device & 1
        own = np.where(here, np.cumsum(here) - 1, -1)[ids[way.ids]]
        given = []
        for number, (x, value, s) in enumerate(zip(node.inputs, values, states, strict=True)):
            picked = number in OPS[node.op].picks.values() and x is way.ids
            if isinstance(s, Routed):
                mine = here[ids[s.ids]].astype(bool)
                value = np.where(mine.reshape(*mine.shape, *[1] * (value.ndim - 2)), value, np.nan)
            elif isinstance(s, Split):
                value = value[s.masks() >> device & 1 != 0]
            given.append(own if picked else value)
        if not here.any():
            continue
        if state is PARTIAL:
            total = total + reference(*given, own, **node.attrs)
        else:
            part = reference(*given, **node.attrs)
            if part.shape != whole.shape or not np.allclose(part[own >= 0], whole[own >= 0]):
                raise Unsound(f"{node.op} of {states}")
    if state is PARTIAL and not np.allclose(total, whole):
        raise Unsound(f"{node.op} of {states}: the sum of all devices")


@pytest.mark.parametrize("name", NODES)
def test_what_is_allowed_is_sound(name: str):
    assert soundness(name) == {*NODES[name][1].split()}


FAULTS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "views keep rows": ("permute", lambda m: m.setattr(axes, "_BY_ROW", (*Kind,))),
    "rows picked by number keep theirs": (
        "select_rows", lambda m: m.setattr(axes, "_BY_ROW", (*Kind,)),
    ),
    "an expert of two devices counts twice": (
        "expert_sum", lambda m: m.setattr(axes, "_of_one_each", lambda split: True),
    ),
    "an op that says of nothing which rows it picks": (
        "matmul_id", lambda m: m.setitem(OPS, "matmul_id", replace(OPS["matmul_id"], picks={})),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_rule_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch):
    name, seed = FAULTS[fault]
    seed(monkeypatch)
    with pytest.raises((Unsound, AssertionError, IndexError)):
        assert soundness(name) == {*NODES[name][1].split()}


# Models: the same numbers as on one device, in float64 and by the kernels.

SIZES = {
    "qwen3moe": Sizes("qwen3moe", experts=6, inner=32),
    "qwen35moe": Sizes("qwen35moe", layers=2, experts=5, inner=32, used=3),
    "gpt-oss": Sizes("gpt-oss", experts=6, inner=32),
    "few": Sizes("qwen3moe", experts=2, inner=32, used=1),
    "many": Sizes("qwen3moe", experts=40, inner=32, used=2),  # tiles of one column
}
SHARES = ((1, 1), (3, 1), (1, 1, 1), (1, 0.01, 2), (1,) * 5)
EXACT = {"kv_type": "f32", "activations": "f32", "context": 128}
PROMPT = [(7 * n + 3) % 80 for n in range(45)]


def across(graph: Graph, shares: Sequence[float]) -> list[Graph]:
    layout = infer(graph, shares, True)
    assert any("whole experts" in reason for reason in layout.why.values())
    return list(shards(layout))


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(((found - wanted) ** 2).sum() / max(1e-300, (wanted**2).sum()))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return model_files(tmp_path_factory.mktemp("across"), SIZES)


def _steps(model: runtime.Model) -> list[np.ndarray]:
    """A prompt, one in pieces, tokens one by one, and some together."""
    first, second = model.session(), model.session()
    found = [first.eval(PROMPT), second.eval(PROMPT[:3])]
    found += [second.eval([token]) for token in PROMPT[3:9]]
    found += [second.eval(PROMPT[9:20])]
    return found + model.step([(first, [5]), (second, PROMPT[:9])])


@pytest.mark.parametrize("name", SIZES)
def test_logits_are_those_of_one_device(files: Callable[..., Path], name: str):
    with runtime.load(files(name), threads=2, **EXACT) as model:
        wanted = _steps(model)
    for shares in SHARES:
        with load_split(files(name), shares, divide=across, **EXACT) as model:
            for found, want in zip(_steps(model), wanted, strict=True):
                assert error(found, want) <= 1e-10


@pytest.mark.parametrize("name", ["qwen35moe", "gpt-oss"])
def test_quantised(files: Callable[..., Path], name: str):
    """Experts of one block are whole without being asked for it."""
    given = {"kv_type": "f16", "context": 128, "activations": "f32"}
    with runtime.load(files(name, "Q8_0"), threads=2, **given) as model:
        wanted = _steps(model)
    for shares in ((1, 1), (3, 1, 2)):
        with load_split(files(name, "Q8_0"), shares, **given) as model:
            for found, want in zip(_steps(model), wanted, strict=True):
                assert error(found, want) <= 1e-6


SCALED = (
    "nvfp4 experts", "nvfp4 biases", "fused experts with scales", "nvfp4 qwen3next",
    "one scale for all experts, biases", "ollama gptoss",
)  # fmt: skip


@pytest.mark.parametrize("name", SCALED)
def test_scales_of_experts_and_matrices_in_one(tmp_path: Path, name: str):
    """The ids that choose a scale are those of all experts, whoever has them."""
    size, plainly, change = DIALECTS[name]
    file = File.of(size)
    plainly(file)
    change(file)
    path = file.write(tmp_path / "m.gguf")
    with runtime.load(path, threads=2, **EXACT) as model:
        wanted = _steps(model)
    with load_split(path, (1, 2, 1), divide=across, **EXACT) as model:
        for found, want in zip(_steps(model), wanted, strict=True):
            assert error(found, want) <= 1e-10


@pytest.mark.parametrize("name", ["gptoss", "qwen35moe", "qwen3moe", "qwen3next"])
def test_golden_models(golden: Path, name: str):
    path, arrays = golden / name / "model-f32.gguf", np.load(golden / name / "golden.npz")
    prompt = arrays["p130_ids"].tolist()[:100]
    with runtime.load(path, threads=2, **EXACT) as model:
        wanted = model.eval(prompt)
    for shares in ((1, 1), (3, 1), (1, 1, 1), (1,) * 5):
        with load_split(path, shares, divide=across, **EXACT) as model:
            assert error(model.eval(prompt), wanted) <= 1e-10


# A layer: numbers, plans, and who has which weights.

HIDDEN, INNER, COUNT = 96, 64, 6


class Mixture:
    """A feed-forward part with experts, with biases or without, and its numbers."""

    def __init__(
        self, kind: str = "F32", inner: int = INNER, count: int = COUNT, used: int = 2
    ) -> None:
        self.kind, self.inner, self.count, self.used = DTYPES[kind.lower()], inner, count, used
        self.rng, self.tensors = np.random.default_rng(7), dict[str, Stored]()

    def w(self, name: str, *shape: int) -> Tensor:
        if self.kind is F32 and name not in self.tensors:
            value = (self.rng.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)
            self.tensors[name] = Stored(value, value.view(np.uint8), F32)
        return ops.weight(name, shape, self.kind if len(shape) == 3 else F32)

    def graph(self, tokens: int = 4, ending: str = "sum", layers: int = 1) -> Graph:
        x = ops.step_input("x", (ops.Dim("tokens", tokens), HIDDEN), F32)
        for i in range(layers):
            x = ops.add(x, self.layer(f"{i}.", x, ending))
        return Graph((x,), "mixture")

    def layer(self, at: str, x: Tensor, ending: str) -> Tensor:
        shares = ops.softmax(ops.matmul(x, self.w(f"{at}scores", self.count, HIDDEN)))
        ids = ops.top_k(shares, k=self.used)
        weights = ops.normalize(ops.take(shares, ids))

        def product(x: Tensor, name: str, rows: int) -> Tensor:
            w = self.w(f"{at}{name}", self.count, rows, int(x.shape[-1]))
            bias = self.w(f"{at}{name}.b", self.count, rows)
            return ops.expert_bias(ops.matmul_id(x, w, ids), bias, ids)

        gate, up = product(x, "gate", self.inner), product(x, "up", self.inner)
        y = product(ops.mul(ops.silu(gate), up), "down", HIDDEN)
        if ending == "first":  # some other use of rows than a sum over choices
            return ops.reshape(ops.slice_(y, axis=1, start=0, stop=1), shape=(y.shape[0], HIDDEN))
        return ops.expert_sum(y, weights)

    def check(self, graphs: Sequence[Graph], whole: Graph, tokens: int) -> None:
        """What devices make together is what one does, in float64."""
        given = {"x": np.random.default_rng(2).standard_normal((tokens, HIDDEN))}
        backend = ReferenceBackend(file_of(self.tensors))
        (wanted,) = backend.program(whole).run(given, {"tokens": tokens})

        def leaf(device: int, node: Tensor) -> np.ndarray:
            if node.op == "weight":
                return backend.weight(node)
            return node.attrs["value"] if node.op == "constant" else given[node.name]

        for (found,) in run_together(graphs, leaf, {"tokens": tokens}):
            assert error(found, wanted) <= 1e-24


@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_what_fused_ops_mean(tokens: int, shares: tuple[float, ...]):
    """The graphs of devices behind all passes: tiles, packs, routers, biases and sums."""
    made = Mixture()
    whole = made.graph(tokens)
    graphs = across(whole, shares)
    made.check(graphs, whole, tokens)
    made.check([prepare(graph, options("f32")) for graph in graphs], whole, tokens)


def test_a_device_needs_no_more_calls_than_one_that_has_all():
    """Own numbers and tiles come from the router's call, and from the sort of many tokens."""
    made = Mixture()
    backend = CpuBackend(file_of(made.tensors), 1)
    for tokens, more in ((1, 0), (40, 0)):
        whole = made.graph(tokens)
        (first, *_) = across(whole, (1, 1))
        calls, plain = (
            [c.kernel.name for one in backend.plan(g).instructions for c in one.calls]
            for g in (first, whole)
        )
        assert len([c for c in calls if not c.startswith("all_sum")]) <= len(plain) + more + 1
        assert "renumber" not in calls and calls.count("router") == 1
        assert calls.count("expert_group") == plain.count("expert_group")
    backend.close()


def test_weights_are_only_where_their_experts_are():
    made = Mixture()
    layout = infer(made.graph(), (3, 1, 2), True)
    graphs = shards(layout)
    shapes = [{stored_name(leaf): leaf.shape[0] for leaf in g.leaves("weight")} for g in graphs]
    for name in ("gate", "up", "down", "gate.b", "up.b", "down.b"):
        assert [each[f"0.{name}"] for each in shapes] == [3, 1, 2]
    assert [each["0.scores"] for each in shapes] == [COUNT] * 3


def test_a_device_without_experts_is_absent():
    made = Mixture(count=2)
    whole = made.graph()
    layout = infer(whole, (1,) * 5, True)
    (total,) = layout.sums
    assert bin(layout.holders[total]).count("1") == 2
    graphs = shards(layout)
    made.check(graphs, whole, 4)
    ids = [node for g in graphs for node in g.nodes if node.op == "renumber"]
    assert len(ids) == 2


@pytest.mark.parametrize("shares", [(1, 1), (3, 1), (5, 3), (1, 9), (3, 2, 1)], ids=str)
def test_experts_are_dealt_by_bytes_over_layers(shares: tuple[float, ...]):
    """What a device got too much of in a layer it gets less of in the next: within one expert."""
    layout = infer(Mixture("Q8_0", 32, count=7).graph(layers=6), shares)
    weights = [graph.leaves("weight") for graph in shards(layout)]
    had = np.array([sum(x.nbytes for x in each) for each in weights])
    asked = had.sum() * np.array(shares) / sum(shares)
    assert np.abs(had - asked).max() <= had.sum() / (7 * 6)


# The choice.


def _how(layout: Layout) -> set[str]:
    """How experts are divided: at all, inside, or as wholes."""
    found = {
        "whole" if use.axis == 0 else "inside"
        for node, uses in layout.uses.items()
        for x, use in zip(node.inputs, uses, strict=True)
        if x.op == "weight" and x.ndim == 3 and isinstance(use, Split)
    }
    return found or {"not"}


@pytest.mark.parametrize(
    ("kind", "inner", "shares", "wanted"),
    [
        ("F32", 64, (1, 1), "inside"),
        ("F32", 64, (3, 1), "inside"),
        ("Q8_0", 32, (1, 1), "whole"),  # one block
        ("Q8_0", 64, (1, 1), "inside"),
        ("Q8_0", 64, (1, 1, 1), "whole"),  # two blocks for three devices
        ("Q4_K", 768, (1, 1), "whole"),  # three for two
        ("Q4_K", 768, (1, 1, 1), "inside"),
        ("Q4_K", 768, (2, 1), "inside"),
        ("Q4_K", 768, (1, 0, 1), "whole"),  # three for two, and one that has none
        ("Q4_K", 768, (2, 0, 1), "inside"),
        ("Q4_K", 512, (1, 1), "inside"),
        ("Q8_0", 768, (1,) * 7, "inside"),  # 24 for seven are nearly even
    ],
)
def test_insides_are_divided_where_that_is_even(
    kind: str, inner: int, shares: tuple[float, ...], wanted: str
):
    graph = Mixture(kind, inner, count=16, used=8).graph()
    layout = infer(graph, shares)
    assert _how(layout) == {wanted}
    reasons = {w.name: r for w, r in layout.why.items() if "whole experts" in r}
    names = {f"0.{part}{b}" for part in ("gate", "up", "down") for b in ("", ".b")}
    assert reasons.keys() == (names if wanted == "whole" else set())
    assert _how(infer(graph, shares, False)) == ({"inside"} if inner > 32 else {"not"})
    assert _how(infer(graph, shares, True)) == {"whole"}


def test_what_is_no_sum_over_choices_is_left_alone():
    """Somebody looks at rows of single experts: they cannot be with some devices only."""
    made = Mixture()
    whole = made.graph(ending="first")
    layout = infer(whole, (1, 1), True)
    assert "whole" not in _how(layout)
    made.check(shards(layout), whole, 4)


def test_names_and_capacities_decide_nothing(files: Callable[..., Path]):
    def decided(tokens: int, rename: str) -> list[str]:
        graph = Mixture("Q8_0", 32).graph(tokens, layers=2)
        made: dict[Tensor, Tensor] = {}
        for number, node in enumerate(graph.nodes):
            inputs = tuple(made[x] for x in node.inputs)
            made[node] = replace(node, inputs=inputs, name=rename.format(number) or node.name)
        layout = infer(Graph(tuple(made[o] for o in graph.outputs)), (2, 1, 1))
        return [f"{layout.states[n]} {[*map(str, layout.uses[n])]}" for n in layout.graph.nodes]

    assert decided(4, "") == decided(4, "{}") == decided(512, "")
    assert any("by expert" in line for line in decided(4, ""))


@pytest.mark.parametrize("name", ["qwen35moe", "gpt-oss"])
def test_every_capacity_has_experts_in_the_same_places(files: Callable[..., Path], name: str):
    model = build(open_gguf(files(name, "Q8_0")))

    def leaves(tokens: int, outputs: int) -> dict[str, object]:
        step = Step.capacity(
            tokens, outputs, 4, 8, 3, model.layers, ("f16", "f16"), model.positions_per_token
        )
        layout = infer(choose_rows(model.graph(step)), [3, 1, 2])
        assert any("whole experts" in reason for reason in layout.why.values())
        return {
            f"{device} {leaf.name}": (tuple(leaf.shape), leaf.attrs.get("cut"))
            for device, graph in enumerate(shards(layout))
            for leaf in graph.nodes if leaf.op in ("weight", "state")
        }  # fmt: skip

    first = leaves(1, 1)
    for tokens, outputs in ((2, 2), (8, 1), (64, 8), (512, 512)):
        assert leaves(tokens, outputs) == first


def test_a_file_of_one_block_is_not_mirrored(files: Callable[..., Path]):
    """The reason why experts used to be everywhere."""
    file = open_gguf(files("qwen3moe", "Q8_0"))
    assert file.tensors["blk.0.ffn_down_exps.weight"].shape[-1] == 32
    with load_split(files("qwen3moe", "Q8_0"), (1, 1), context=64) as model:
        graphs = model.backend.graphs(model.graph(tokens=1))
        sizes = [{w.name: w.shape[0] for w in g.leaves("weight") if w.ndim == 3} for g in graphs]
        assert all({*each.values()} == {3} and len(each) == 6 for each in sizes)
