"""Networks of experts on the CUDA backend: few tokens choice by choice, many in tiles by expert.

Kernels run at once in numpy; one point of each in the simulator, which finds races.
"""

from __future__ import annotations

import numpy as np
import pytest
from cuda_calls import simulate
from cuda_models import fake_cuda
from test_fused_ffn import HIDDEN, Layer, file

from runtime import ops
from runtime.backends.cuda.kernels.experts_group import groups_of
from runtime.backends.reference import ReferenceBackend
from runtime.ops.graph import Graph

NAMES = ("softmax", "shared", "ungated", "oai")
CASES = [
    *((name, kind) for name in NAMES for kind in ("f32", "q8_0")),
    *(("shared", "f16"), ("oai", "f16"), ("oai", "bf16")),
]
X = np.random.default_rng(3).standard_normal((20, HIDDEN)).astype(np.float32)


def graph(name: str, tokens: int, kind: str) -> Graph:
    return Graph((getattr(Layer(tokens, kind), name)(),), name)


def results(g: Graph, tokens: int, kind: str, **options) -> tuple[np.ndarray, list[str]]:
    """Rows of a step whose `tokens` are all it has room for but poison; and its launches."""
    backend = fake_cuda(file(kind), quick=True, **options)
    program = backend.program(g)
    room = int(g.outputs[0].shape[0])
    x = np.pad(X[:tokens], ((0, room - tokens), (0, 0)), constant_values=np.nan)
    (found,) = program.run({"x": x}, {"tokens": tokens})
    launches = [call.kernel.name for call in program.plan.calls()]
    found = np.array(found)
    backend.close()
    return found, launches


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_experts_have_the_same_bits_for_few_tokens_and_for_many(name: str, kind: str):
    wanted = ReferenceBackend(file(kind)).program(graph(name, 3, kind))
    (expected,) = wanted.run({"x": X[:3]}, {"tokens": 3})
    many, grouped = results(graph(name, 12, kind), 11, kind)
    few, fused = results(graph(name, 3, kind), 3, kind)
    one, _ = results(graph(name, 1, kind), 1, kind)
    plain, _ = results(graph(name, 3, kind), 3, kind, fuse=False)
    np.testing.assert_array_equal(few, many[:3])
    np.testing.assert_allclose(few, plain, atol=1e-5)
    np.testing.assert_array_equal(few[:1], one)
    limit = 1e-3 if kind == "q8_0" else 1e-12
    assert ((few - expected) ** 2).mean() < limit * (expected**2).mean()
    tiles = {"f32": "tile_float", "q8_0": "tile"}
    assert {"expert_group", tiles.get(kind, "tile_half")} <= set(grouped)
    if kind == "q8_0":
        assert fused.count("expert_pair") == fused.count("expert_total") == 1
        assert not {"expert_group", "expert_sum"} & set(fused)
    if (name, kind) == ("shared", "q8_0"):
        assert not {"swiglu", "matvec", "matvec_float"} & set(fused), "it is one more choice"


def some_experts(tokens: int) -> Graph:
    """A device that has experts 1, 4 and 5, the latter as its first and second."""
    layer = Layer(tokens, "q8_0")
    scores = layer.scores()
    shares = ops.softmax(scores)
    ids = ops.top_k(shares, k=3)
    numbers = ops.constant("numbers", np.array([-1, 2, -1, -1, 0, 1, -1, -1], np.int32))
    own = ops.renumber(ids, numbers)
    y = [ops.matmul_id(layer.h, layer.w(f"{n}_exps"), own) for n in ("gate", "up")]
    inner = ops.mul(ops.silu(y[0]), y[1])
    y = ops.matmul_id(inner, layer.w("down_exps"), own)
    return Graph((ops.expert_sum(y, ops.take(shares, ids), own),))


def test_experts_that_are_elsewhere_are_left_out():
    (expected,) = (
        ReferenceBackend(file("q8_0")).program(some_experts(11)).run({"x": X[:11]}, {"tokens": 11})
    )
    many, _ = results(some_experts(12), 11, "q8_0")
    few, _ = results(some_experts(4), 4, "q8_0")
    np.testing.assert_array_equal(few, many[:4])
    assert ((many - expected) ** 2).mean() < 1e-3 * (expected**2).mean()
    assert not (expected == 0).all(1).all() and (expected == 0).all(1).any()


@pytest.mark.parametrize("tokens", [1, pytest.param(12, marks=pytest.mark.sweep)])
def test_launches_of_experts_race_with_nothing(tokens: int):
    found = []
    for quick in (True, False):
        backend = fake_cuda(file("q8_0"), quick=quick)
        program = backend.program(graph("oai", tokens, "q8_0"))
        found.append(np.array(program.run({"x": X[:tokens]}, {"tokens": tokens})[0]))
        backend.close()
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(
    ("room", "live", "k", "experts", "width"),
    [(9, 7, 2, 4, 16), (5, 5, 3, 6, 2), (20, 17, 4, 8, 16), (3, 0, 2, 3, 16)],
)
def test_choices_are_listed_by_expert(rng, room: int, live: int, k: int, experts: int, width: int):
    ids = rng.integers(-1, experts, (room, k)).astype(np.int32)
    capacity = groups_of(room * k, experts, width)
    order, groups = np.full(room * k, 99, np.uint32), np.full((capacity, 4), 99, np.uint32)
    simulate(
        "expert_group", (experts,), ids, np.array([live]), order, groups, k, experts, width,
        capacity,
    )  # fmt: skip
    flat = ids[:live].reshape(-1)
    wanted = [e for e in np.argsort(flat, kind="stable") if flat[e] >= 0]
    np.testing.assert_array_equal(order[: len(wanted)], wanted)
    assert groups[:, 2].sum() == len(wanted) and groups[:, 2].max(initial=0) <= width
    at = 0
    for expert, first, count, _ in groups[groups[:, 2] > 0]:
        assert first == at and (flat[order[first : first + count]] == expert).all()
        at += count
