"""The kernels compiled ahead of time are all that any step of a model can need."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_models import HYBRID, NOVEL, PLAIN, Sizes, write_model

import runtime
from runtime.backends.cpu.planner import Planner, make_plan
from runtime.backends.cpu.planner import options as cpu_options
from runtime.backends.passes.packing import Options
from runtime.backends.plan.kernel import Kernel
from runtime.engine.batch import UBATCH
from runtime.engine.graphs import capacity
from runtime.model import Model
from runtime.ops import Graph
from runtime.ops.kv_formats import KV_FORMATS

# (experts, used): from many tokens for each expert to less than one in a full step
MIXTURES = [(6, 2), (8, 2), (32, 4), (64, 6), (128, 8), (512, 10)]
AMX = {"wide": 16, "split": True}
SIZES = {
    **{name: Sizes(name, layers=1) for name in PLAIN if name != "qwen3moe"},
    **{
        f"{name}-{experts}": Sizes(name, layers=2, experts=experts, used=used, inner=32)
        for name in ("qwen3moe", "gpt-oss", "qwen3next", "qwen35moe")
        for experts, used in MIXTURES
    },
    **{name: size for name, size in NOVEL.items() if not size.experts or size.fused},
}


def _steps(model: Model) -> Iterator[Graph]:
    """A graph for every step there can be."""
    for tokens in range(1, UBATCH + 1):
        for outputs in {1, min(tokens, 7), tokens}:
            t, r = capacity(tokens, outputs)
            if (t, r) == (tokens, outputs):
                yield model.graph(t, r)


def _kernels(graphs: list[Graph], options: Options) -> set[Kernel]:
    return {kernel for graph in graphs for kernel in make_plan(graph, options).kernels()}


def _check(path: Path, kv_type: str, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    with runtime.load(path, devices="null", kv_type=kv_type) as model:
        monkeypatch.setattr(model.backend, "planner", Planner(options))
        needed = _kernels(list(_steps(model)), options)
        assert needed - _kernels(model._engine.graphs.warm(model.backend), options) == set()
        assert len({kernel.name for kernel in needed}) > 6


@pytest.mark.parametrize("wide", [{}, AMX], ids=["8 columns", "amx"])
@pytest.mark.parametrize("name", ["llama", "qwen3moe-6", "qwen3moe-128", "gpt-oss-32", "qwen35"])
def test_no_step_needs_another_kernel(name, wide, tmp_path, monkeypatch):
    path = write_model(tmp_path / "m.gguf", SIZES[name], "Q8_0")
    _check(path, "f16", cpu_options(**wide), monkeypatch)


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0"])
@pytest.mark.parametrize("name", SIZES)
def test_no_step_of_any_architecture_needs_another_kernel(name, kind, tmp_path, monkeypatch):
    path = write_model(tmp_path / "m.gguf", SIZES[name], kind)
    for activations, wide in itertools.product(("int8", "f32"), ({}, AMX)):
        for kv_type in ("f16", "q8_0,f32") if kind == "Q8_0" else ("f16",):
            _check(path, kv_type, cpu_options(activations, **wide), monkeypatch)


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["llama", "gpt-oss", "qwen35"])
def test_no_kv_type_needs_another_kernel(name, tmp_path, monkeypatch):
    path = write_model(tmp_path / "m.gguf", NOVEL.get(name, Sizes(name)))
    for pair in itertools.product(KV_FORMATS, KV_FORMATS):
        _check(path, ",".join(pair), cpu_options(), monkeypatch)


def test_every_architecture_is_here():
    assert {size.architecture for size in SIZES.values()} == {*PLAIN, *HYBRID, "gpt-oss"}
