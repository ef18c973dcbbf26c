"""Fixtures shared by the tests: golden data where it is, small models made here."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from alarms import alarm  # noqa: F401  a fixture
from alone import ALONE, alone, turn, workers
from kept_processes import Kept
from small_models import NOVEL, write_model

from runtime.backends.plan import pool

# Files whose tests take moments: they compile next to nothing.
QUICK = frozenset({
    "test_arguments", "test_backends", "test_chat_template", "test_detokenizer",
    "test_device_expressions", "test_environment", "test_gguf", "test_graph", "test_hostile_files",
    "test_imports", "test_memory", "test_open_devices", "test_plans", "test_progress",
    "test_quants", "test_readme", "test_rope_components", "test_sampling", "test_traffic",
})  # fmt: skip

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-m quick` runs what answers within a minute, kernels not yet compiled included."""
    for item in items:
        if item.path.stem in QUICK and item.get_closest_marker("slow") is None:
            item.add_marker("quick")


def pytest_collection_finish() -> None:
    """What thousands of tests are made of stays: no collection looks through it again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Among several workers, tests take turns with those that run alone."""
    if not workers():
        return (yield)
    folder = item.config._tmp_path_factory.getbasetemp().parent  # type: ignore[attr-defined]
    with turn(folder):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """What times something runs alone, when its fixtures are made."""
    name = getattr(item, "originalname", item.name)  # without its parameters
    with nullcontext() if ALONE.isdisjoint((item.path.stem, name)) else alone():
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def kept_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One start of a compile process for many tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "Pool", Kept)
        if workers() and sys.platform != "win32":
            folder = tmp_path_factory.getbasetemp().parent / "kernels"
            folder.mkdir(exist_ok=True)
            patch.setattr(Kept, "shared", folder)
        yield
    Kept.end()


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden data; tests that need it are skipped where it is absent."""
    if not GOLDEN.is_dir():
        pytest.skip("the golden data (../shared/golden) is not here")
    return GOLDEN


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random qwen3 model of two layers, F32."""
    return write_model(tmp_path_factory.mktemp("models") / "small.gguf")


@pytest.fixture(scope="session")
def hybrid_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random qwen35 model of three layers, two of them recurrent, F32."""
    return write_model(tmp_path_factory.mktemp("models") / "hybrid.gguf", NOVEL["qwen35"])


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
