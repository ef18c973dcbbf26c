"""`del model` frees a model at once: nothing refers to itself in a circle.

Two large models must never lie in memory side by side because Python has not collected yet.
"""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small_models import NOVEL, Sizes, write_model

import runtime
from runtime.model import Model

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _steps(model: Model) -> None:
    model.eval([1, 2, 3])
    with model.session() as session:
        session.eval(list(range(1, 20)), "last")
        session.rewind(3)
        other = session.fork()
        before = session.snapshot()
        model.step([(session, [4]), (other, [5])])
        session.restore(before)


def _demo_answers(model: Model) -> None:
    list(model.generate("Once", max_tokens=3))
    half = model.generate("Once upon", max_tokens=9)
    next(half)
    next(iter(model.chat([{"role": "user", "content": "Hi"}], max_tokens=4)))


def _mistakes(model: Model) -> None:
    session = model.session()
    for wrong in ([], [-1], [1] * 10_000):
        with pytest.raises(runtime.Error):
            session.eval(wrong)


def _inspected(model: Model) -> None:
    str(model.graph(4)), repr(model), model.memory()


def _closed(model: Model) -> None:
    session = model.session()
    model.close()
    with pytest.raises(runtime.Error):
        session.eval([1])


USES: list[Callable[[Model], Any]] = [
    lambda model: None, _steps, _mistakes, _inspected, _closed, lambda model: model.session(),
]  # fmt: skip


def _dies(load: Callable[[], Model], use: Callable[[Model], Any]) -> None:
    """Loading, using and forgetting a model leaves nothing of it."""
    model = load()
    parts = [weakref.ref(x) for x in (model, model.backend, model.file.__class__ and model._engine)
             if type(x).__weakrefoffset__]  # fmt: skip
    memory = getattr(getattr(model.backend, "weights", None), "_made", {}).values()
    arrays = [weakref.ref(array) for array in memory]
    del memory
    kept = use(model)
    del kept, model
    assert [ref() for ref in parts if ref() is not None] == []
    assert all(ref() is None for ref in arrays), "weights are still there"


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.parametrize("devices", ["cpu", "reference", "null"])
def test_a_forgotten_model_is_gone(uncollected, small_model: Path, devices: str, use):
    _dies(lambda: runtime.load(small_model, devices=devices, context=64), use)


@pytest.mark.parametrize("name", ["llama", *NOVEL])
def test_of_every_architecture(uncollected, tmp_path: Path, name: str):
    path = write_model(tmp_path / "m.gguf", NOVEL.get(name, Sizes(name)))
    _dies(lambda: runtime.load(path, context=64), _steps)


def test_with_answers_under_way(uncollected):
    _dies(lambda: runtime.load(context=128), _demo_answers)


def test_in_a_with_block(uncollected, small_model: Path):
    with runtime.load(small_model) as model:
        gone = weakref.ref(model)
        model.eval([1, 2])
    del model
    assert gone() is None


def test_a_session_keeps_its_model_and_then_lets_it_go(uncollected, small_model: Path):
    model = runtime.load(small_model)
    gone, session = weakref.ref(model), model.session()
    del model
    assert session.eval([1, 2, 3]).shape == (3, 80) and gone() is not None
    del session
    assert gone() is None


def test_a_program_that_is_kept_keeps_what_it_reads(uncollected, small_model: Path):
    model = runtime.load(small_model)
    gone, program = weakref.ref(model), model.backend.program(model.graph(1))
    weights = [weakref.ref(array) for array in model.backend.weights._made.values()]
    del model
    assert gone() is None and all(ref() is not None for ref in weights)
    del program
    assert all(ref() is None for ref in weights)


def test_a_model_that_does_not_load_leaves_nothing(uncollected, tmp_path: Path, monkeypatch):
    from runtime.backends.cpu import CpuBackend

    made: list[weakref.ref] = []
    load = CpuBackend.load

    def fails_late(self, *args):
        load(self, *args)
        made.append(weakref.ref(self))
        raise runtime.Error("no")

    monkeypatch.setattr(CpuBackend, "load", fails_late)
    path = write_model(tmp_path / "m.gguf")
    with contextlib.suppress(runtime.Error):
        runtime.load(path)
    assert made and made[0]() is None


@pytest.mark.parametrize("name", ["llama", *NOVEL])
def test_nothing_waits_for_the_collector(uncollected, tmp_path: Path, name: str):
    """Not only models: no array, tensor or graph either."""
    path = write_model(tmp_path / "m.gguf", NOVEL.get(name, Sizes(name)))
    _dies(lambda: runtime.load(path, context=64), _steps)  # what is imported late has circles
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        _dies(lambda: runtime.load(path, context=64), _steps)
        gc.collect()
        left = Counter(type(x).__module__ + "." + type(x).__qualname__ for x in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    assert [each for each in left if each.startswith(("runtime.", "numpy."))] == []


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_twenty_models_one_after_another(tmp_path: Path):
    """Resident memory stays that of one model, with the collector off."""
    program = """
import gc, sys
import runtime
gc.disable()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
sizes = []
for n in range(20):
    model = runtime.load(sys.argv[1], context=64, threads=2)
    model.eval([1, 2, 3])
    del model
    sizes.append(resident())
print(max(sizes[2:]) - sizes[1])
"""
    size = Sizes("llama", hidden=512, inner=2048, vocabulary=8000)
    path = write_model(tmp_path / "m.gguf", size, "Q8_0")
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < path.stat().st_size, "one more than once"
