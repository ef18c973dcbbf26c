"""Layers on several devices: the bits of one device, whatever is done, and whatever goes wrong."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from alarms import AlarmError, second_signal
from layered import load_layered
from small_models import NOVEL, Sizes, Values, write_model
from test_interrupts import CASES, FILES, STRIDE, storm, sweep

import runtime
from runtime import ops
from runtime.backends.meta import layers, line
from runtime.backends.meta.layers import LayersBackend, LayersProgram
from runtime.backends.reference import ReferenceBackend
from runtime.engine import batch
from runtime.engine.advance import Piece
from runtime.errors import BackendError, OptionError
from runtime.model import Model
from runtime.ops.cost import page_nbytes
from runtime.ops.dtypes import F32

IDS = np.random.default_rng(8).integers(0, 80, 200).tolist()
GOLDEN = {
    **dict.fromkeys(("llama", "qwen2", "qwen3moe", "qwen35", "gptoss"), ("f32", "f16")),
    "qwen3": ("f32", "Q4_0", "Q8_0", "Q4_K_M"),
    "qwen35moe": ("f32", "Q4_0", "MXFP4_MOE"), "qwen3next": ("f32", "Q8_0", "Q4_K_M"),
}  # fmt: skip
FORMS = [
    (f"{name}/model-{kind}.gguf", shares, activations, kv)
    for n, (name, kinds) in enumerate(GOLDEN.items())
    for m, kind in enumerate(kinds)
    for shares in [([1, 1], [3, 1], [1, 0, 2])[(n + m) % 3]]
    for activations, kv in [("int8", "f16"), ("f32" if m else "int8", "q8_0")]
]  # fmt: skip


@pytest.fixture(autouse=True)
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of a few dozen tokens take several steps."""
    monkeypatch.setattr(batch, "_STAGED", 8)


@pytest.mark.parametrize("file, shares, activations, kv", FORMS)
def test_golden_models(golden: Path, file: str, shares: list[float], activations: str, kv: str):
    options = {"kv_type": kv, "context": 256, "activations": activations}
    ids = np.load(golden / file.split("/")[0] / "golden.npz")["p130_ids"].tolist()
    with (
        runtime.load(golden / file, threads=1, **options) as one,
        load_layered(golden / file, shares, **options) as model,
        one.session() as wanted, model.session() as session,
    ):  # fmt: skip
        rows = [s.eval(ids) for s in (wanted, session)]
        np.testing.assert_array_equal(*rows)
        for _ in range(4):
            token = int(rows[0][-1].argmax())
            rows = [s.eval([token]) for s in (wanted, session)]
            np.testing.assert_array_equal(*rows)


@pytest.mark.parametrize(
    "devices",
    ["layers(tensor(cpu:0,cpu:1),cpu:2)", "tensor(layers(cpu:0,cpu:1),layers(2*cpu:2,cpu:3))"],
)
@pytest.mark.parametrize("name", ["qwen3", "qwen35", "qwen3moe"])
def test_tensors_split_in_stages(golden: Path, name: str, devices: str):
    options, ids = {"kv_type": "f32", "context": 256}, np.load(golden / name / "golden.npz")
    ids = ids["p130_ids"].tolist()
    with runtime.load(golden / name / "model-f32.gguf", threads=1, **options) as one:
        wanted = one.eval(ids)
    with runtime.load(golden / name / "model-f32.gguf", devices=devices, **options) as model:
        got = model.eval(ids)
        assert ((got - wanted) ** 2).mean() <= 1e-10 * (wanted**2).mean()
        with model.session() as session:  # in other pieces the same bits
            rows = [session.eval(ids[:70]), session.eval(ids[70:71]), session.eval(ids[71:])]
        np.testing.assert_array_equal(np.concatenate(rows), got)


@pytest.fixture(scope="module", params=["dense", "hybrid"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    size = Sizes(layers=4) if request.param == "dense" else NOVEL["qwen35"]
    return write_model(tmp_path_factory.mktemp("layers") / "m.gguf", size, "Q8_0")


@pytest.fixture(scope="module")
def one(path: Path) -> Iterator[Model]:
    with runtime.load(path, threads=1, sequences=4) as model:
        yield model


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    with load_layered(path, [1, 1, 1], sequences=4) as model:
        yield model


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every step that goes through the threads of the stages."""
    found: list[int] = []
    step = LayersProgram.step

    def noted(self, inputs, live):
        found.append(live["tokens"])
        return step(self, inputs, live)

    monkeypatch.setattr(LayersProgram, "step", noted)
    return found


@pytest.mark.parametrize("n", range(1, 9))
def test_any_number_of_devices(path: Path, one: Model, n: int):
    rng = np.random.default_rng(n)
    with load_layered(path, (rng.random(n) + 0.1).tolist(), context=128) as model:
        assert model.backend.threads == n
        np.testing.assert_array_equal(model.eval(IDS[:100]), one.eval(IDS[:100]))


def test_prompts_take_several_steps_and_decoding_one(model: Model, one: Model, counted: list[int]):
    with model.session() as session, one.session() as wanted:
        for ids in (IDS[:150], IDS[150:158], IDS[158:159]):
            for logits in ("all", "last", "none"):
                rows = [s.eval(ids, logits) for s in (session, wanted)]
                np.testing.assert_array_equal(*rows)
                if len(ids) < 9:
                    assert not counted
                else:
                    assert len(counted) > 8 and sum(counted) == len(ids)
                counted.clear()
                for s in (session, wanted):
                    s.rewind(len(ids))
            for s in (session, wanted):
                s.eval(ids, "none")
            counted.clear()


def act(model: Model) -> list[np.ndarray]:
    """Batches of any mix, with forks, rewinds and snapshots: the rows that come."""
    found = []
    a, b, c = (model.session() for _ in range(3))
    found += model.step([(a, IDS[:70]), (b, IDS[10:90]), (c, IDS[5:6])])
    child = a.fork()
    found += model.step([(child, IDS[:40]), (a, [3]), (b, IDS[:3]), (c, IDS[50:100])], "last")
    before = child.snapshot()
    child.rewind(37)
    found.append(child.eval(IDS[100:145]))
    child.restore(before)
    found += model.step([(s, [7]) for s in (a, b, c, child)])
    for holder in (before, child, a, b, c):
        holder.close()
    return found


def test_batches_forks_rewinds_snapshots(model: Model, one: Model, counted: list[int]):
    for got, wanted in zip(act(model), act(one), strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert counted
    pools = model._engine.pools
    assert (pools.pages.available, pools.slots.available) == (pools.pages.count, pools.slots.count)


def test_pieces_of_one_native_step(model: Model, one: Model, counted: list[int]):
    """Of a model without recurrent layers they go through the stages in several steps."""
    found = []
    for each in (model, one):
        a, b, c = (each.session() for _ in range(3))
        pieces = [
            Piece(a._sequence, IDS[:60], "last"), Piece(b._sequence, IDS[5:6]),
            Piece(c._sequence, IDS[9:80], [0, 50, 70]),
        ]  # fmt: skip
        found.append(each._engine.run(pieces))
        found[-1] += each._engine.run([Piece(s._sequence, IDS[80:81]) for s in (a, b, c)])
        assert [len(s) for s in (a, b, c)] == [61, 2, 72]
        for session in (a, b, c):
            session.close()
    assert sum(counted) == (0 if model._engine.memory.slots else 132)
    for got, wanted in zip(*found, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_logits_that_are_not_finite(tmp_path: Path):
    """Of one piece, or of one step while others are under way: an error for that piece alone."""
    v, bad = Values(3), 7
    embeddings, output = v.matrix(80, 64) * 8, v.matrix(80, 64)
    embeddings[bad] = np.nan
    replace = {"token_embd.weight": embeddings, "output.weight": output}
    path = write_model(tmp_path / "m.gguf", Sizes(), replace=replace)
    ids = [i for i in IDS if i != bad]
    with load_layered(path, [1, 1], context=256) as model:
        session, other = model.session(), model.session()
        with pytest.raises(BackendError, match="not finite"):
            session.eval([*ids[:50], bad, *ids[50:80]])
        assert len(session) == 0 and settled(model)
        pieces = [Piece(session._sequence, [bad, *ids[:20]]), Piece(other._sequence, ids[:40])]
        wrong, rows = model._engine.run(pieces)
        assert isinstance(wrong, BackendError) and (len(session), len(other)) == (0, 40)
        np.testing.assert_array_equal(rows, model.eval(ids[:40], "last"))


def test_progress_is_told_in_order(model: Model):
    told: list[tuple[int, int]] = []
    with model.session() as session:
        session.eval(IDS[:100], "last", on_prompt=lambda *at: told.append(at))
    assert told[0] == (0, 100) and told[-1] == (100, 100) and len(told) > 8
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def settled(model: Model) -> bool:
    return not model.backend._line._under_way  # type: ignore[attr-defined]


@pytest.mark.parametrize("stage", range(3))
def test_an_error_of_a_stage(model: Model, one: Model, stage: int, monkeypatch: pytest.MonkeyPatch):
    """In one step while others are under way: it is raised, and nothing has happened."""
    team = model.backend._devices[stage].team  # type: ignore[attr-defined]
    run, calls = team.run, []

    def fails(*plan, **how):
        calls.append(plan)
        if len(calls) == 4:
            raise BackendError("stage broken")
        run(*plan, **how)

    with model.session() as session:
        session.eval(IDS[:20], "none")
        monkeypatch.setattr(team, "run", fails)
        with pytest.raises(BackendError, match="stage broken"):
            session.eval(IDS[20:120])
        assert session.tokens == IDS[:20] and settled(model) and len(calls) >= 4
        np.testing.assert_array_equal(session.eval(IDS[20:60]), one.eval(IDS[:60])[20:])


def test_what_on_prompt_raises_ends_the_step(model: Model, one: Model):
    def stop(done: int, total: int) -> None:
        if done > 20:
            raise ZeroDivisionError

    with model.session() as session:
        session.eval(IDS[:20], "none")
        with pytest.raises(ZeroDivisionError):
            session.eval(IDS[20:120], on_prompt=stop)
        assert session.tokens == IDS[:20] and settled(model)
        np.testing.assert_array_equal(session.eval(IDS[20:60]), one.eval(IDS[:60])[20:])


@pytest.fixture(scope="module")
def pair(path: Path) -> Iterator[tuple[Model, Model]]:
    options = {"context": 256, "sequences": 1}
    with load_layered(path, [1, 1], **options) as model:
        model._engine.most_tokens = 32
        with runtime.load(path, threads=1, **options) as right:
            yield model, right


@pytest.mark.parametrize("name", ["long prompt", "step", "eval after a rewind", "run"])
def test_an_interrupt_leaves_the_old_state_or_the_new_one(
    pair: tuple[Model, Model], name: str, monkeypatch: pytest.MonkeyPatch
):
    files = [*FILES, layers.__file__, line.__file__]
    monkeypatch.setattr("test_interrupts.FILES", files)
    assert sweep(pair, CASES[name], 3 * STRIDE, steady=False) >= 5
    pair[0].eval(IDS[:50])
    assert settled(pair[0])


def test_real_signals(pair: tuple[Model, Model], alarm: Callable[[float], None]):
    assert storm(pair, alarm, 12) == 12


class Slow:
    """A line of two stages that take for ever unless they are aborted; how many have begun."""

    def __init__(self) -> None:
        self.aborted, self.begun = threading.Event(), 0
        self.line = line.Line(2, self.aborted.set)

    def stage(self) -> None:
        self.begun += 1
        assert self.aborted.wait(60)

    def steps(self) -> Iterator[line.Step]:
        return (line.Step([self.stage, self.stage], list) for _ in range(9))


def test_a_signal_ends_what_stages_are_doing(alarm: Callable[[float], None]):
    slow = Slow()
    started = time.perf_counter()
    with pytest.raises(AlarmError):
        alarm(0.1)
        list(slow.line.through(slow.steps()))
    assert time.perf_counter() - started < 20 and slow.begun == 1
    assert not slow.line._under_way
    assert len(list(slow.line.through(slow.steps()))) == 9
    slow.line.close()


def test_what_two_signals_leave_under_way_is_ended_by_who_comes_next(
    alarm: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
):
    slow = Slow()

    def steps() -> Iterator[line.Step]:
        second_signal(monkeypatch, line.Line, "settle")
        yield from slow.steps()

    with pytest.raises(AlarmError):
        alarm(0.1)
        list(slow.line.through(steps()))
    assert slow.line._under_way and not slow.aborted.is_set()
    slow.line.settle()
    assert not slow.line._under_way and slow.aborted.is_set() and slow.begun == 1
    slow.line.close()


def stage_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("runtime-stage")]


@pytest.mark.parametrize("closed", [True, False])
def test_threads_end(path: Path, closed: bool):
    gc.collect()
    before = len(stage_threads())
    model = load_layered(path, [1, 1, 1], context=128)
    model.eval(IDS[:8])
    assert len(stage_threads()) == before  # a line starts with the first long prompt
    model.eval(IDS[:100])
    assert len(stage_threads()) == before + 3
    if closed:
        model.close()
    del model
    gc.collect()
    assert len(stage_threads()) == before


def test_threads_that_cannot_start(path: Path, one: Model, monkeypatch: pytest.MonkeyPatch):
    start, started = threading.Thread.start, []

    def refused(thread: threading.Thread) -> None:
        if thread.name == "runtime-stage-1":
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    with load_layered(path, [1, 1], context=128) as model, model.session() as session:
        session.eval(IDS[:5], "none")
        monkeypatch.setattr(threading.Thread, "start", refused)
        for _ in range(2):
            with pytest.raises(BackendError, match=r"a thread for each of 2 stages .*ulimit"):
                session.eval(IDS[5:100], "last")
        monkeypatch.undo()
        assert session.tokens == IDS[:5]
        monkeypatch.setattr(batch, "_STAGED", 8)
        np.testing.assert_array_equal(session.eval(IDS[5:100]), one.eval(IDS[:100])[5:])
    assert not any(thread.is_alive() for thread in started)


def test_a_closed_backend_starts_again(path: Path):
    backend = LayersBackend([ReferenceBackend(), ReferenceBackend()])
    backend.close()
    backend.close()


def test_a_device_without_a_share_has_nothing(path: Path, one: Model):
    with load_layered(path, [0, 2, 0, 1], context=128) as model:
        assert model.backend.stages == 2 and model.backend.threads == 2  # type: ignore[attr-defined]
        assert model.backend._all[0].weights.nbytes() == 0  # type: ignore[attr-defined]
        np.testing.assert_array_equal(model.eval(IDS[:30]), one.eval(IDS[:30]))


def test_memory_is_where_its_stage_is(model: Model):
    """And nowhere else; what is written is read, and what is copied."""
    backend, rng = model.backend, np.random.default_rng(1)
    for leaf in model.graph(1).leaves("state"):
        values = rng.standard_normal((1, *leaf.shape[1:])).astype(leaf.dtype.numpy or np.float32)
        backend.write_state(leaf, [1], values)
        backend.copy_pages([leaf], [1], [0])
        np.testing.assert_array_equal(backend.read_state(leaf, [0]), backend.read_state(leaf, [1]))
        has = [d.read_state(leaf, [0]).any() for d in backend._devices]  # type: ignore[attr-defined]
        assert sum(has) == 1
        assert backend.page_nbytes(leaf) == page_nbytes(leaf)
        backend.write_state(leaf, [0, 1], np.zeros((2, *leaf.shape[1:]), np.float32))
    with pytest.raises(BackendError, match=r"no graph of layers.* has the state other"):
        backend.read_state(ops.state("other", (3, 4), F32, "slots"), [0])


def test_too_many_devices(path: Path):
    with pytest.raises(OptionError, match=r"500 devices, one behind the other, .* at most \d+ dev"):
        load_layered(path, [1] * 500, context=128)


@pytest.mark.parametrize(
    "variable, value, said",
    [("DEBUG", "2", "attention"), ("VALIDATE", "1", r"results of 1 step agree")],
)
def test_what_is_looked_at_runs_one_step_after_the_other(
    path: Path, one: Model, variable: str, value: str, said: str, counted: list[int],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    with load_layered(path, [1, 1], context=128) as model:
        wanted = one.eval(IDS[:50])
        monkeypatch.setenv(variable, value)
        np.testing.assert_array_equal(model.eval(IDS[:50]), wanted)
    assert not counted and said in capsys.readouterr().err


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
FORK = """
import os, signal, sys, threading
sys.path.insert(0, "tests")
import numpy as np
from alarms import AlarmError, second_signal
from layered import load_layered
from runtime.engine import batch
from runtime.engine.advance import Piece

batch._STAGED = 8
ids = [i % 70 for i in range(100)]
model = load_layered(sys.argv[1], [1, 1], context=256)
wanted = model.eval(ids)
stop = False

def run():
    while not stop:
        model.eval(ids, "none")

busy = threading.Thread(target=run)
busy.start()
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        os._exit(not np.array_equal(model.eval(ids), wanted))
    assert os.waitpid(pid, 0)[1] == 0
stop = True
busy.join()
assert np.array_equal(model.eval(ids), wanted)
model.close()
print("done")
"""


@needs_fork
def test_forks_beside_a_prompt(path: Path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK, str(path)],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr
