"""Models on several virtual devices: the logits of one device, in every kind of step."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from alarms import AlarmError
from small_models import NOVEL, Sizes, model_files
from tensor_models import load_split

import runtime
from runtime.backends.cpu.joint import at_once
from runtime.backends.cpu.run.weights import WeightStore
from runtime.backends.meta.parts import exactly
from runtime.model import Model

SHARES = {
    "1:1": (1, 1), "3:1": (3, 1), "1:2": (1, 2), "3": (1, 1, 1), "4": (1,) * 4, "5": (1,) * 5,
}  # fmt: skip
SIZES = {
    "llama": Sizes("llama", heads=6, kv_heads=3), "qwen3": Sizes("qwen3"), "qwen2": Sizes("qwen2"),
    "qwen3moe": Sizes("qwen3moe", experts=6, inner=32), **NOVEL,
}  # fmt: skip
GOLDEN = ["llama", "qwen2", "qwen3", "qwen3moe", "gptoss", "qwen35", "qwen35moe", "qwen3next"]
EXACT = {"kv_type": "f32", "activations": "f32", "context": 256}
IDS = [(7 * n + 3) % 80 for n in range(45)]


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(((found - wanted) ** 2).sum() / (wanted**2).sum())


def greedy(model: Model, ids: list[int], count: int) -> tuple[np.ndarray, list[int]]:
    """The logits of a prompt, and the likeliest ids behind it."""
    found: list[int] = []
    with model.session() as session:
        logits = session.eval(ids)
        row = logits[-1]
        for _ in range(count):
            found.append(int(row.argmax()))
            row = session.eval(found[-1:])[-1]
    return logits, found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return model_files(tmp_path_factory.mktemp("split"), SIZES)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
def test_logits_are_those_of_one_device(files: Callable[..., Path], name: str, shares: tuple):
    with runtime.load(files(name), threads=2, **EXACT) as model:
        wanted, ids = greedy(model, IDS, 12)
    with load_split(files(name), shares, **EXACT) as model:
        logits, found = greedy(model, IDS, 12)
    assert error(logits, wanted) <= 1e-10
    assert found == ids


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_models(golden: Path, name: str):
    """With 24 ids, under all numbers of devices and shares."""
    path, arrays = golden / name / "model-f32.gguf", np.load(golden / name / "golden.npz")
    prompt = arrays["p130_ids"].tolist()
    with runtime.load(path, threads=2, **EXACT) as model:
        wanted, ids = greedy(model, prompt, 24)
    for shares in SHARES.values():
        with load_split(path, shares, **EXACT) as model:
            logits, found = greedy(model, prompt, 24)
        assert error(logits, wanted) <= 1e-10
        assert found == ids


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("name", ["qwen3", "qwen35moe", "gpt-oss"])
def test_quantised(files: Callable[..., Path], name: str, kind: str, kv_type: str):
    path = files(name, kind)
    with runtime.load(path, threads=2, kv_type=kv_type, activations="f32") as model:
        wanted = model.eval(IDS)
    for shares in ((1, 1), (1, 2, 1)):
        with load_split(path, shares, kv_type=kv_type, activations="f32") as model:
            assert error(model.eval(IDS), wanted) <= 1e-6


@pytest.mark.parametrize("name", GOLDEN)
def test_bits_of_one_device(golden: Path, name: str):
    """Of every file, with int8 and float32 activations, and caches of several types."""
    ways = cycle([("f16", "int8"), ("q8_0", "int8"), ("f16", "f32"), ("q8_0", "f32")])
    shares = cycle(SHARES.values())
    for path in sorted((golden / name).glob("model-*.gguf")):
        kv_type, activations = next(ways)
        given = {"kv_type": kv_type, "activations": activations, "context": 256}
        with runtime.load(path, threads=2, **given) as model:
            wanted, ids = greedy(model, IDS, 4)
        with load_split(path, next(shares), divide=exactly, **given) as model:
            logits, found = greedy(model, IDS, 4)
        assert found == ids
        np.testing.assert_array_equal(logits, wanted)


def every_kind_of_step(model: Model) -> Iterator[np.ndarray]:
    """Batches of prompts and single tokens, forks, rewinds and snapshots."""
    first, second = model.session(), model.session()
    yield first.eval(IDS[:33])
    yield from model.step([(first, [5]), (second, IDS[:7])])
    third = first.fork()
    yield from model.step([(first, [1]), (second, [2, 3]), (third, [4])])
    before = first.snapshot()
    yield first.eval([9, 8, 7])
    first.restore(before)
    yield first.eval([9])
    first.rewind(20)
    yield first.eval(IDS[:20])
    others = [model.session() for _ in range(61)]
    many = enumerate([*others, first, second, third])
    rows = model.step([(s, IDS[n % 20 : n % 20 + 1 + n % 9]) for n, s in many])
    yield from rows
    for session in (first, second, third, *others):
        session.close()


@pytest.mark.parametrize("name", ["llama", "gpt-oss", "qwen35", "qwen3next"])
def test_every_kind_of_step(files: Callable[..., Path], name: str):
    with runtime.load(files(name), threads=2, **EXACT) as model:
        wanted = list(every_kind_of_step(model))
    for shares in ((1, 1), (3, 1), (1, 2, 3)):
        with load_split(files(name), shares, **EXACT) as model:
            found = list(every_kind_of_step(model))
        assert len(found) == len(wanted)
        assert all(error(a, b) <= 1e-10 for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", ["llama", "gpt-oss", "qwen35", "qwen3next"])
def test_every_kind_of_step_has_the_bits_of_one_device(files: Callable[..., Path], name: str):
    path = files(name, "Q8_0")
    with runtime.load(path, threads=2, context=256) as model:
        wanted = list(every_kind_of_step(model))
    with runtime.load(path, "tensor(cpu:0,0*cpu:1,2*cpu:2)", threads=3, context=256) as model:
        for got, want in zip(every_kind_of_step(model), wanted, strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", ["qwen3", "qwen35"])
def test_the_same_bits(files: Callable[..., Path], name: str):
    """Whatever the threads, and how a prompt is cut."""
    found = []
    for threads in ((1, 1), (2, 1), (1, 3)):
        with load_split(files(name, "Q8_0"), (2, 1), threads) as model:
            found.append(model.eval(IDS))
            session = model.session()
            found.append(np.concatenate([session.eval(IDS[a : a + 9]) for a in range(0, 45, 9)]))
    assert len({x.tobytes() for x in found}) == 1


@pytest.mark.parametrize("name", ["llama", "qwen35"])
def test_states_are_the_same_under_every_split(files: Callable[..., Path], name: str):
    """What some devices read, others or one alone write and go on with."""
    path = files(name)
    with runtime.load(path, threads=2, **EXACT) as model:
        session = model.session()
        session.eval(IDS)
        wanted = session.eval([11])
    held = None
    for shares in ((1, 1), (1, 3, 1), (), (2, 1)):
        load = load_split(path, shares, **EXACT) if shares else runtime.load(path, **EXACT)
        with load as model:
            session = model.session()
            if held is None:
                session.eval(IDS)
            else:  # as loading a session will do it: the same pages and slots, other numbers
                session.eval([1] * len(IDS))
            leaves = model._engine.graphs.graph(1, 1).leaves("state")
            if held is not None:
                for leaf in leaves:
                    model.backend.write_state(leaf, range(3), held[leaf.name])
            held = {leaf.name: model.backend.read_state(leaf, range(3)) for leaf in leaves}
            assert all(np.any(x) for x in held.values())
            assert error(session.eval([11]), wanted) <= 1e-10


def test_an_interrupted_step_leaves_sessions_as_they_were(
    files: Callable[..., Path], alarm: Callable[[float], None]
):
    path, ids = files("qwen3"), [n % 80 for n in range(4000)]
    with load_split(path, (1, 1), kv_type="f32", context=8192) as model:
        session = model.session()
        session.eval(IDS)
        other = session.fork()
        wanted = other.eval([5])
        started = time.perf_counter()
        other.eval(ids, "last")
        took = time.perf_counter() - started
        for after in (took / 3, took / 9):
            with pytest.raises(AlarmError):
                alarm(after)
                session.eval(ids, "last")
                time.sleep(2)
            assert len(session) == len(IDS)
        assert np.array_equal(session.eval([5]), wanted)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_has_devices_of_its_own(files: Callable[..., Path]):
    with load_split(files("qwen3"), (1, 1), (2, 1)) as model:
        wanted = model.eval(IDS)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = 0 if np.array_equal(model.eval(IDS), wanted) else 2
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert np.array_equal(model.eval(IDS), wanted)


def test_a_forgotten_model_is_gone_at_once(files: Callable[..., Path]):
    before = threading.active_count()
    gc.collect()
    gc.disable()
    try:
        model = load_split(files("qwen3"), (1, 1), (2, 1))
        model.eval(IDS)
        assert threading.active_count() == before + 2, "one of each team but the caller"
        dead = weakref.ref(model.backend)
        del model
        assert dead() is None
        assert threading.active_count() == before
    finally:
        gc.enable()


def test_what_a_step_is_made_of(files: Callable[..., Path], monkeypatch, capsys):
    monkeypatch.setenv("DEBUG", "3")
    monkeypatch.setenv("VALIDATE", "1")
    with load_split(files("qwen3"), (1, 1)) as model:
        model.eval([1])
        model.eval([2])
        graph = model._engine.graphs.graph(1, 1)
        _, nanoseconds = model.backend.program(graph).profile(
            {leaf.name: np.zeros(leaf.shape, np.int32) for leaf in graph.leaves("input")},
            {"tokens": 1, "outputs": 1, "sequences": 1},
        )
    assert len(nanoseconds) and (nanoseconds > 0).all()
    shown = capsys.readouterr().err
    assert "the first of 2 devices" in shown and "all_sum" in shown and "whole" in shown
    assert shown.count("VALIDATE: nothing is compared on tensor (cpu") == 1


def test_embeddings_lie_in_memory_once(files: Callable[..., Path]):
    with load_split(files("qwen3"), (1, 1)) as model:
        first, second = (device.weights for device in model.backend._devices)
        assert first._rows is second._rows and len(first._rows) == 1


def test_loading_tells_how_far_it_is(files: Callable[..., Path]):
    told: list[tuple[int, int]] = []
    with load_split(
        files("qwen3"), (1, 1), progress=lambda done, total, what: told.append((done, total))
    ):
        pass
    assert told and told[-1][0] == told[-1][1]
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_an_error_of_one_device_ends_loading(files: Callable[..., Path], monkeypatch):
    plain, turns = WeightStore.address, iter(range(1000))

    def address(self: WeightStore, buffer: object) -> int:
        if next(turns) == 9:
            raise MemoryError("no more")
        return plain(self, buffer)

    before = threading.active_count()
    with monkeypatch.context() as patched, pytest.raises(MemoryError, match="no more"):
        patched.setattr(WeightStore, "address", address)
        load_split(files("qwen3"), (1, 1))
    gc.collect()
    assert threading.active_count() == before
    load_split(files("qwen3"), (1, 1)).close()


def test_who_stops_listening_ends_the_work():
    ended = []

    def work(n: int) -> Iterator[int]:
        try:
            while True:
                time.sleep(0.001)
                yield n
        finally:
            ended.append(n)

    found = at_once(work(n) for n in range(3))
    seen = {next(found) for _ in range(20)}
    found.close()
    assert seen <= {0, 1, 2} and sorted(ended) == [0, 1, 2]


def test_memory_of_a_page(files: Callable[..., Path]):
    """Heads that several devices have count as often, even before the first step."""
    with runtime.load(files("qwen3"), **EXACT) as model:
        whole = model.memory()
    with load_split(files("qwen3"), (1, 1), **EXACT) as model:
        assert model.memory().page == whole.page
    with load_split(files("qwen3"), (1, 1, 1, 1), **EXACT) as model:
        assert model.memory().page == 2 * whole.page


def test_a_step_is_aborted_by_another_thread(files: Callable[..., Path]):
    ids = [n % 80 for n in range(400)]
    with load_split(files("qwen3"), (1, 1), **{**EXACT, "context": 1024}) as model:
        wanted, ended = model.eval(ids), threading.Event()

        def work() -> None:
            with contextlib.suppress(runtime.Error):  # what an aborted step left is not finite
                model.eval(ids)
            ended.set()

        for _ in range(5):
            ended.clear()
            threading.Thread(target=work).start()
            while not ended.wait(0.001):
                model.backend.abort()
        assert np.array_equal(model.eval(ids), wanted)
