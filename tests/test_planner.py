"""Predicted bytes against what plans and backends of each device really take."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import NOVEL, Sizes, write_model

import runtime
from runtime.arguments import kv_types
from runtime.backends.cpu.planner import Planner, options
from runtime.backends.meta.choices import chosen
from runtime.backends.meta.planner import plan_stages
from runtime.backends.meta.shard import shard
from runtime.gguf.reader import open_gguf
from runtime.models import outline
from runtime.models.registry import build, one_token
from runtime.ops.cost import Seen, page_nbytes
from runtime.ops.dtypes import F16, F32
from runtime.ops.elementwise import add
from runtime.ops.graph import Graph, rewrite
from runtime.ops.tensor import Tensor, step_input, weight
from runtime.planning import Model, Placement, balanced, by_memory, fitted, would_fit
from runtime.traffic import of_token

GB = 10**9
PLANNER = Planner(options())


def without_collectives(graph: Graph) -> Graph:
    """What a device computes between them: their results come from outside."""
    partial: list[Tensor] = []

    def replaced(node: Tensor, *inputs: Tensor) -> Tensor:
        partial.extend(inputs)
        return step_input(f"{node.op} {node.attrs['number']}", node.shape, node.dtype)

    found = rewrite(graph, {"all_sum": replaced, "all_gather": replaced})
    return Graph((*found.outputs, *dict.fromkeys(partial)), graph.name)


def test_weights_that_are_widened_count_as_float32() -> None:
    x, bias = step_input("x", (1, 8), F32), weight("b", (8,), F16)
    node = add(x, bias)
    assert (
        PLANNER.weights_nbytes({(node, 1): bias})
        == 4 * 8
        == planned_nbytes(Graph((node,)), True)[0]
    )


def planned_nbytes(graph: Graph, rows: bool) -> tuple[int, int, int]:
    """Bytes of weights, of pages and of slots, by the CPU's plan of a graph.

    rows: with weights of which rows are looked up.
    """
    graph = without_collectives(graph)
    found: dict[str, dict[object, int]] = {"weight": {}, "page": {}, "slot": {}}
    for buffer in PLANNER.plan(graph).buffers():
        x = buffer.tensor
        if buffer.memory == "state" and x is not None:
            kind = "slot" if x.attrs["storage"] == "slots" else "page"
            found[kind][buffer.content] = page_nbytes(x)
        elif buffer.memory in ("raw", "vector", "repacked")[not rows :] and x is not None:
            found["weight"][buffer.content] = FORMS[buffer.memory](x)
    weights, pages, slots = (sum(each.values()) for each in found.values())
    return weights, pages, slots


def repacked(x: object) -> int:
    from runtime.backends.cpu.run.forms import repacked_nbytes

    return repacked_nbytes(x)


FORMS = {"raw": lambda x: x.nbytes, "vector": lambda x: 4 * x.size, "repacked": repacked}


@pytest.mark.parametrize("name", ["qwen3", *NOVEL])
@pytest.mark.parametrize("devices", ["cpu", "tensor(cpu:0,cpu:1)", "tensor(3*cpu:0,2*cpu:1,cpu:2)"])
def test_bytes_of_small_models_are_those_of_the_plans(
    name: str, devices: str, tmp_path: Path
) -> None:
    file = open_gguf(write_model(tmp_path / "m.gguf", NOVEL.get(name, Sizes())))
    compare(file, devices)


@pytest.mark.parametrize("name", sorted(outline.known()))
def test_bytes_of_known_models_are_those_of_the_plans(name: str) -> None:
    compare(outline.read(outline.known()[name]), "tensor(cpu:0,cpu:1)")


def compare(file: object, devices: str) -> None:
    architecture = build(file)
    graph = architecture.graph(one_token(architecture))
    (plan,) = plan_stages(graph, chosen(devices))
    for device in range(len(plan.devices)):
        local = graph if plan.layout is None else shard(plan.layout, device)
        weights, pages, slots = planned_nbytes(local, rows=device == 0)
        assert (plan.weights(device), plan.pages(device), plan.slots(device)) == (
            weights, pages, slots
        )  # fmt: skip


def cpus(backend: Any) -> list[Any]:
    """The CPU backends behind a device made of devices."""
    inner = getattr(backend, "_devices", None)
    return [backend] if inner is None else [cpu for each in inner for cpu in cpus(each)]


def nbytes(arrays: dict[Any, np.ndarray]) -> int:
    return sum(array.nbytes for array in arrays.values())


@pytest.mark.parametrize(
    "devices", ["cpu", "tensor(3*cpu:0,cpu:1)", "layers(cpu:0,tensor(cpu:1,cpu:2))"]
)
def test_bytes_are_those_that_backends_take(devices: str, hybrid_model: Path) -> None:
    with runtime.load(hybrid_model, devices, context=64, sequences=1) as model:
        model.eval([1, 2, 3], "last")
        seen: set[int] = set()
        taken = []
        for cpu in cpus(model.backend):
            rows = 0 if id(cpu.weights._rows) in seen else nbytes(cpu.weights._rows)
            seen.add(id(cpu.weights._rows))
            taken.append((nbytes(cpu.weights._made) + rows, nbytes(cpu.memory._states)))
        pages, slots = model.memory().pages, model.memory().slots
        needs = Placement(Model(model.file), chosen(devices)).needs.values()
    assert [(n.weights, n.page * pages + n.slot * slots) for n in needs] == taken


@pytest.mark.parametrize("name", ["qwen3.5-35b-a3b", "gpt-oss-120b"])
def test_bytes_that_are_read_are_those_of_the_local_graphs(name: str) -> None:
    architecture = build(outline.read(outline.known()[name]))
    graph = architecture.graph(one_token(architecture))
    (plan,) = plan_stages(graph, chosen("tensor(cpu:0,cpu:1)"))
    found = np.array(plan.reads(Seen(lengths=(1000,))))
    assert len(found) <= len(plan.exchanges)
    for n in range(2):
        assert plan.layout is not None
        local = of_token(shard(plan.layout, n), 1000)
        assert found[:, n].sum() == pytest.approx(local.nbytes, rel=0.01)


def test_stages_hold_what_the_whole_holds() -> None:
    file = Model(outline.read(outline.known()["llama-3.1-8b"]))
    whole = Placement(file, chosen("cuda:24GB"))
    parts = Placement(file, chosen("layers(2*cuda:0:24GB,cuda:1:24GB)"))
    nested = Placement(file, chosen("layers(cuda:0:24GB,tensor(cuda:1:24GB,cuda:2:24GB))"))
    weights = next(iter(whole.needs.values())).weights
    assert sum(n.weights for n in parts.needs.values()) == weights
    assert sum(n.weights for n in nested.needs.values()) == pytest.approx(weights, rel=0.001)
    assert sum(n.page for n in nested.needs.values()) == next(iter(whole.needs.values())).page
    first, second = (n.weights for n in parts.needs.values())
    assert first / second == pytest.approx(2, rel=0.1)


def placed(name: str, devices: str, **more: object) -> Placement:
    return Placement(Model(outline.read(outline.known()[name])), chosen(devices), **more)


def test_the_largest_context_fills_the_device_and_no_more() -> None:
    placement = placed("qwen3.5-27b", "cuda:24GB")
    (device,) = placement.needs
    used = placement.usage(device).nbytes
    assert placement.fits and used <= 24 * GB < used + placement.needs[device].page
    more = placed("qwen3.5-27b", "cuda:24GB", asked=placement.context + 32)
    assert not more.fits and more.most == placement.context
    assert not placed("qwen3.5-27b", "cuda:16GB").fits


def test_a_context_beyond_the_trained_one_fits_where_there_is_room() -> None:
    assert placed("qwen3-0.6b", "cuda:24GB").context == 40960
    assert placed("qwen3-0.6b", "cuda:24GB", asked=100_000).fits
    short = placed("qwen3-0.6b", "cuda:8GB", asked=100_000)
    assert not short.fits and 40960 < short.most < 100_000


def test_smaller_caches_take_less() -> None:
    sizes = [
        placed("llama-3.1-8b", "cuda:24GB", kv_types=(kind, kind), asked=8192).usage(device).cache
        for kind in ("f16", "q8_0", "q4_0")
        for device in placed("llama-3.1-8b", "cuda:24GB").needs
    ]
    assert [size / sizes[0] for size in sizes] == [1, 34 / 64, 18 / 64]
    both = placed("llama-3.1-8b", "cuda:24GB", kv_types=kv_types("f16,q8_0"), asked=8192)
    assert both.usage(*both.needs).cache == (sizes[0] + sizes[1]) / 2


def test_memory_of_this_machine_is_shared_by_its_devices() -> None:
    one = placed("llama-3.1-8b", "cpu", free=12 * GB)
    two = placed("llama-3.1-8b", "layers(cpu:0,cpu:1)", free=12 * GB)
    ((devices, room),) = two.rooms()
    assert len(devices) == 2 and room < 12 * GB
    assert two.most == pytest.approx(one.most, rel=0.02)


def test_shares_follow_memory_where_none_are_given() -> None:
    (stage,) = by_memory(chosen("tensor(cuda:24GB,cuda:16GB)"))
    assert stage.shares == (Fraction(60, 100), Fraction(40, 100))
    stages = by_memory(chosen("layers(cuda:24GB,tensor(cuda:8GB,cuda:8GB))"))
    assert [s.share for s in stages] == [Fraction(61, 100), Fraction(39, 100)]
    tiny = by_memory(chosen("tensor(cuda:99TB,cuda:1GB)"))[0].shares
    assert tiny == (Fraction(100, 101), Fraction(1, 101))
    unknown = chosen("tensor(cuda:24GB,cuda)")
    assert by_memory(unknown) == unknown


def test_fit_finds_shares_that_fill_all_devices() -> None:
    stages = chosen("tensor(3*cuda:24GB,2*cuda:8GB)")
    given = Placement(Model(outline.read(outline.known()["qwen3.5-27b"])), stages)
    found = fitted(given, free_kv=True, free_shares=True)
    assert found.most > 1.1 * given.most
    by_room = replace(given, stages=by_memory(chosen("tensor(cuda:24GB,cuda:8GB)")))
    assert found.most > 0.95 * by_room.most
    assert fitted(given, free_kv=True, free_shares=False) == given


@pytest.mark.parametrize("second", (1, 3, 4, 8))
def test_a_second_device_never_makes_it_worse(second: int) -> None:
    stages = by_memory(chosen(f"tensor(cuda:24GB,cuda:{second}GB)"))
    given = Placement(Model(outline.read(outline.known()["qwen3.5-27b"])), stages)
    found = fitted(given, free_kv=False, free_shares=True)
    assert found.fits and found.most >= placed("qwen3.5-27b", "cuda:24GB").most
    assert len(found.needs) == (1 if second == 1 else 2)
    if second == 1:
        assert not balanced(given).fits
        assert [*would_fit(given)][-1] == f"{found.most:,} tokens on cuda:0:24GB"
    for first in (80, 85, 90, 93, 96) if second > 1 else ():
        other = chosen(f"tensor({first}*cuda:24GB,{100 - first}*cuda:{second}GB)")
        assert found.most >= replace(given, stages=other).most


def test_what_would_fit_does_fit() -> None:
    given = placed(
        "llama-3.1-70b", "tensor(cuda:18GB,cuda:18GB)", kv_types=("q4_0", "q4_0"), asked=32768
    )
    assert not given.fits
    (only,) = would_fit(given)
    assert only == "32,768 tokens with weights of Q2_K"
    file = outline.of_file(given.model.file, "Q2_K")
    assert Placement(Model(file), given.stages, given.kv_types, 32768).fits


def test_fit_takes_a_smaller_cache_for_a_context_that_was_asked_for() -> None:
    most = placed("llama-3.1-8b", "cuda:12GB").most
    given = placed("llama-3.1-8b", "cuda:12GB", asked=most + 1024)
    found = fitted(given, free_kv=True, free_shares=True)
    assert found.kv_types == ("q8_0", "q8_0") and found.fits
    assert fitted(given, free_kv=False, free_shares=True) == given
    texts = list(would_fit(given))
    assert texts[0] == f"{most:,} tokens of context"
    assert texts[1] == f"{most + 1024:,} tokens with a q8_0 cache"


def test_speed_is_bytes_over_bandwidth_and_exchanges() -> None:
    one = placed("llama-3.1-8b", "cuda:24GB", asked=4096).speed(lambda plan, device, x: 900e9)
    two = placed("llama-3.1-8b", "tensor(cuda:0:24GB,cuda:1:24GB)", asked=4096)
    both = two.speed(lambda plan, device, x: 900e9)
    assert one is not None and both is not None
    read = of_token(two.model.graph, 2048).nbytes
    assert one.tokens_per_s == pytest.approx(900e9 / read)
    assert both.reading[0] == pytest.approx(one.reading[0] / 2, rel=0.02)
    assert both.exchanging[0] > 64 * 10e-6
    slow = two.speed(lambda plan, device, x: 900e9, link=1e9)
    assert slow is not None and slow.tokens_per_s < both.tokens_per_s
    assert two.speed(lambda plan, device, x: None) is None


@pytest.mark.parametrize("devices", range(1, 9))
def test_plans_of_a_large_model_are_quick(devices: int) -> None:
    import time

    start = time.process_time()
    names = ",".join(f"cuda:{n}:24GB" for n in range(devices))
    placement = placed("qwen3-coder-next-80b", f"tensor({names})" if devices > 1 else names)
    assert placement.most >= 0
    assert time.process_time() - start < 2


def test_shares_of_bytes_are_those_asked_for() -> None:
    for shares in ((3, 1), (5, 3), (1, 9)):
        placement = placed("qwen3.5-27b", f"tensor({shares[0]}*cuda:0,{shares[1]}*cuda:1)")
        first, second = (need.weights for need in placement.needs.values())
        assert first / (first + second) == pytest.approx(shares[0] / sum(shares), rel=0.02)
