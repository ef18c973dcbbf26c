"""Sessions of models with recurrent layers: forks, snapshots, rewinds and cuts change no bits."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from small_models import NOVEL, write_model

import runtime
from runtime.errors import MemoryLimitError, OptionError
from runtime.model import Model

MODELS = [
    ("reference", "qwen35", "F32"), ("cpu", "qwen35", "F32"), ("cpu", "qwen35moe", "Q8_0"),
    ("cpu", "qwen3next", "Q4_0"),
]  # fmt: skip


def load(path: Path, device: str, **options) -> Model:
    return runtime.load(path, devices=device, context=256, sequences=2, **options)


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def chosen(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    device, name, kind = request.param
    path = tmp_path_factory.mktemp("sessions") / "hybrid.gguf"
    return write_model(path, NOVEL[name], kind), device


@pytest.fixture(scope="module")
def model(chosen: tuple[Path, str]) -> Iterator[Model]:
    with load(*chosen) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return np.random.default_rng(3).integers(0, 80, 150).tolist()


@pytest.fixture(scope="module")
def whole(model: Model, prompt: list[int]) -> np.ndarray:
    return model.eval(prompt)


@pytest.fixture(autouse=True)
def nothing_leaks(model: Model) -> Iterator[None]:
    yield
    pools = model._engine.pools
    if free(model) != (pools.pages.count, pools.slots.count):
        gc.collect()  # an error that was expected holds sessions by its traceback
    assert free(model) == (pools.pages.count, pools.slots.count)


def free(model: Model) -> tuple[int, int]:
    """Pages and slots that no sequence holds."""
    return model._engine.pools.pages.available, model._engine.pools.slots.available


def same(model: Model, got: np.ndarray, want: np.ndarray) -> None:
    """The same bits; on the reference, whose sums are numpy's, the same numbers."""
    if model.backend.name.startswith("reference"):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    else:
        np.testing.assert_array_equal(got, want)


def test_the_state_matters(model: Model, prompt: list[int], whole: np.ndarray):
    """Else nothing below could fail: the last logits depend on what only the state remembers."""
    other = model.eval([prompt[0] + 1, *prompt[1:]])
    assert np.abs(other[-1] - whole[-1]).max() > 1e-3


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_cuts(model: Model, prompt: list[int], whole: np.ndarray, piece: int):
    with model.session() as session:
        rows = [session.eval(prompt[i : i + piece]) for i in range(0, len(prompt), piece)]
    same(model, np.concatenate(rows), whole)


def test_batch_with_other_sequences(model: Model, prompt: list[int], whole: np.ndarray):
    others = [np.random.default_rng(n).integers(0, 80, n).tolist() for n in (1, 9, 33)]
    sessions = [model.session() for _ in range(4)]
    first = model.step([(s, ids[:1]) for s, ids in zip(sessions, [*others, prompt], strict=True)])
    same(model, first[3], whole[:1])
    rest = model.step([
        (s, ids[1:]) for s, ids in zip(sessions, [*others, prompt], strict=True) if ids[1:]
    ])  # fmt: skip
    same(model, rest[2], whole[1:])
    same(model, rest[1], model.eval(others[2])[1:])
    for session in sessions:
        session.close()


def test_fork_shares_and_then_parts(model: Model, prompt: list[int], whole: np.ndarray):
    with model.session() as session:
        session.eval(prompt[:77])
        child, grandchild = session.fork(), session.fork().fork()
        rows = model.step([(session, [1, 2]), (child, prompt[77:]), (grandchild, prompt[77:99])])
        same(model, rows[1], whole[77:])
        same(model, rows[2], whole[77:99])
        same(model, rows[0], model.eval([*prompt[:77], 1, 2])[77:])
        child.close()
        same(model, grandchild.eval(prompt[99:]), whole[99:])
        grandchild.close()


@pytest.mark.parametrize("n", [1, 10, 60, 100])
def test_rewind(model: Model, prompt: list[int], whole: np.ndarray, n: int):
    with model.session() as session:
        session.eval(prompt[:64])
        for token in prompt[64:100]:
            session.eval([token], "none")
        session.rewind(n)
        assert session.tokens == prompt[: 100 - n] and session.evaluated <= 100 - n
        same(model, session.eval(prompt[100 - n :]), whole[100 - n :])
        assert session.tokens == prompt and session.evaluated == 150


def test_rewind_twice_and_forks_of_what_is_not_evaluated_yet(
    model: Model, prompt: list[int], whole: np.ndarray
):
    with model.session() as session:
        for token in prompt[:50]:
            session.eval([token], "none")
        session.rewind(5)
        session.rewind(4)
        child, snapshot = session.fork(), session.snapshot()
        same(model, session.eval(prompt[41:60]), whole[41:60])
        same(model, child.eval(prompt[41:42]), whole[41:42])
        child.restore(snapshot)
        same(model, child.eval(prompt[41:44], "last"), whole[43:44])
        child.close()
        snapshot.close()


def test_rewind_in_a_batch(model: Model, prompt: list[int], whole: np.ndarray):
    first, second = model.session(), model.session()
    model.step([(first, prompt[:70]), (second, prompt[:90])], "none")
    second.rewind(35)
    rows = model.step([(first, prompt[70:71]), (second, prompt[55:58])])
    same(model, rows[0], whole[70:71])
    same(model, rows[1], whole[55:58])
    first.close()
    second.close()


def test_rewind_finds_message_ends(model: Model, prompt: list[int]):
    with model.session() as session:
        session.eval(prompt[:30])
        for token in prompt[30:40]:
            session.eval([token], "none")
        session.eval(prompt[40:60])
        session.rewind(25)
        assert len(session) == 35 and session.evaluated == 30
        session.rewind(5)
        assert len(session) == session.evaluated == 30


def test_a_chain_of_snapshots(model: Model, prompt: list[int], whole: np.ndarray):
    """Ten of one sequence at once, restored in any order, some after the session has ended."""
    session = model.session()
    snapshots = []
    empty = session.snapshot()
    for at in range(0, 100, 10):
        session.eval(prompt[at : at + 10], "none")
        snapshots.append(session.snapshot())
    for i in (9, 0, 4, 4, 7):
        session.restore(snapshots[i])
        at = 10 * (i + 1)
        assert len(session) == at == len(snapshots[i])
        same(model, session.eval(prompt[at : at + 3]), whole[at : at + 3])
    session.restore(empty)
    assert len(session) == 0
    same(model, session.eval(prompt[:9]), whole[:9])
    session.close()
    with model.session() as other:
        other.eval([5, 6, 7])
        other.restore(snapshots[2])
        same(model, other.eval(prompt[30:]), whole[30:])
        assert other.tokens == prompt
    for snapshot in (empty, *snapshots):
        snapshot.close()


def test_a_restored_session_has_a_past(model: Model, prompt: list[int], whole: np.ndarray):
    """States kept before a snapshot serve rewinds behind it, where the tokens are the same."""
    with model.session() as session, model.session() as other:
        session.eval(prompt[:40], "none")
        session.eval(prompt[40:80], "none")
        other.eval([*prompt[:30], 1, 2], "none")
        other.eval([3, 4], "none")
        with session.snapshot() as snapshot:
            session.eval(prompt[80:], "none")
            session.restore(snapshot)
            other.restore(snapshot)
        session.rewind(20)
        other.rewind(20)
        assert session.evaluated == 40 and other.evaluated == 0
        same(model, session.eval(prompt[60:]), whole[60:])
        same(model, other.eval(prompt[60:]), whole[60:])


def test_snapshots_take_a_slot_each(model: Model, prompt: list[int]):
    with model.session() as session:
        snapshots = []
        for at in range(0, 120, 4):
            session.eval(prompt[at : at + 4], "none")
            snapshots.append(session.snapshot())
        assert model._engine.pools.slots.count - free(model)[1] <= 30 + 1
        for snapshot in snapshots:
            snapshot.close()


def test_what_cannot_be_restored(
    model: Model, chosen: tuple[Path, str], prompt: list[int], whole: np.ndarray
):
    with model.session() as session:
        session.eval(prompt[:20])
        snapshot = session.snapshot()
        for options, message in (
            ({"kv_type": "f32"}, "of kv_type f16,f16, this session of kv_type f32,f32"),
            ({}, "of another load of this model"),
        ):
            with load(*chosen, **options) as other, other.session() as foreign:
                foreign.eval([1, 2])
                with pytest.raises(OptionError, match=message) as caught:
                    foreign.restore(snapshot)
                assert "\n" not in str(caught.value) and foreign.tokens == [1, 2]
        with pytest.raises(OptionError, match=r"made by session.snapshot\(\), not 3"):
            session.restore(3)  # type: ignore[arg-type]
        snapshot.close()
        snapshot.close()
        with pytest.raises(OptionError, match="this snapshot is closed"):
            session.restore(snapshot)
        same(model, session.eval(prompt[20:]), whole[20:])
    for use in (session.snapshot, session.fork, lambda: session.rewind(0)):
        with pytest.raises(OptionError, match="this session is closed"):
            use()
    with pytest.raises(OptionError, match="this session is closed"):
        session.restore(snapshot)


def test_a_model_that_closes_ends_its_snapshots(chosen: tuple[Path, str]):
    with load(*chosen) as other:
        session = other.session()
        session.eval([1, 2])
        snapshot = session.snapshot()
    with pytest.raises(OptionError, match="closed"):
        session.restore(snapshot)


def _fill(model: Model) -> tuple[list, list]:
    """Sessions and snapshots that hold every slot."""
    holders = []
    while free(model)[1]:
        session = model.session()
        session.eval([1])
        holders.append(session)
    return holders, [s.snapshot() for s in holders]


def test_no_slot_left_changes_nothing(model: Model, prompt: list[int], whole: np.ndarray):
    session = model.session()
    session.eval(prompt[:20])
    holders, snapshots = _fill(model)
    before, tokens = free(model), list(session.tokens)
    with pytest.raises(MemoryLimitError, match=r"slots of recurrent state are in use; close"):
        model.step([(session, prompt[20:30]), (holders[0], [3])])
    assert free(model) == before and session.tokens == tokens and holders[0].tokens == [1]
    assert free(model)[1] == 0
    for other in (*holders[1:], *snapshots):
        other.close()
    same(model, session.eval(prompt[20:]), whole[20:])
    same(model, holders[0].eval([3]), model.eval([1, 3])[1:])
    session.close()
    holders[0].close()


def test_checkpoints_give_way(model: Model, prompt: list[int], whole: np.ndarray):
    """A session that keeps states of its past never stops another one."""
    with model.session() as session:
        for at in range(0, 150, 15):
            session.eval(prompt[at : at + 15], "none")
        assert len(session._sequence.record.state.checkpoints) > 1
        holders = [model.session() for _ in range(model._engine.pools.slots.count - 1)]
        for holder in holders:
            holder.eval([1])
        assert free(model)[1] == 0 and len(session._sequence.record.state.checkpoints) <= 1
        session.rewind(10)
        same(model, session.eval(prompt[140:]), whole[140:])
        for holder in holders:
            holder.close()


def test_no_page_left_changes_nothing(model: Model, prompt: list[int], whole: np.ndarray):
    filler = [model.session() for _ in range(7)]
    model.step([(s, [n] * 190) for n, s in enumerate(filler)], "none")
    session, other = model.session(), model.session()
    session.eval(prompt[:100], "none")
    child = session.fork()
    before = free(model)
    assert before[0] == 48 - 7 * 6 - 4
    with pytest.raises(MemoryLimitError, match="pages of the KV cache"):
        model.step([(child, prompt[100:101]), (session, prompt[100:]), (other, [1])])
    assert free(model) == before
    assert [len(s) for s in (child, session, other)] == [100, 100, 0]
    same(model, child.eval(prompt[100:120]), whole[100:120])
    for holder in (*filler, other):
        holder.close()
    same(model, session.eval(prompt[100:]), whole[100:])
    session.close()
    child.close()


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_step_that_breaks_changes_nothing(
    model: Model, prompt: list[int], whole: np.ndarray, monkeypatch, first: bool
):
    """Interrupted before or after the device has written, in a decode step and in a prompt."""
    execute = model._engine._execute

    def broken(*arguments):
        if not first:
            execute(*arguments)
        raise KeyboardInterrupt

    with model.session() as session:
        session.eval(prompt[:40], "none")
        session.eval(prompt[40:41], "none")
        for ids in (prompt[41:42], prompt[41:60]):
            monkeypatch.setattr(model._engine, "_execute", broken)
            with pytest.raises(KeyboardInterrupt):
                session.eval(ids)
            monkeypatch.setattr(model._engine, "_execute", execute)
            assert session.tokens == prompt[:41]
        same(model, session.eval(prompt[41:]), whole[41:])


def test_threads(model: Model, prompt: list[int], whole: np.ndarray):
    """Steps, forks, snapshots, rewinds and ends of many threads at once."""
    base = model.session()
    base.eval(prompt[:40], "none")

    def work(seed: int) -> None:
        child = base.fork()
        with child.snapshot() as snapshot:
            child.eval([seed, seed + 1], "none")
            child.rewind(1)
            child.restore(snapshot)
        same(model, child.eval(prompt[40 : 45 + seed]), whole[40 : 45 + seed])
        if seed % 2:
            child.close()  # the others are forgotten

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))
    base.close()


def test_snapshots_are_quick(model: Model, prompt: list[int]):
    with model.session() as session:
        session.eval(prompt, "none")
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            with session.snapshot() as snapshot:
                session.restore(snapshot)
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 0.005


def test_long_prompts_keep_states_on_their_way(chosen: tuple[Path, str]):
    """At the ends of their steps, and shortly before the end, where the next message parts."""
    path, device = chosen
    if device == "reference":
        pytest.skip("numpy takes its time, and the engine cuts prompts alike for every device")
    ids = np.random.default_rng(1).integers(0, 80, 1100).tolist()
    with runtime.load(path, context=1200, sequences=1) as model, model.session() as session:
        with model.session() as cold:
            whole = np.concatenate([cold.eval(ids[i : i + 300]) for i in range(0, 1100, 300)])
        np.testing.assert_array_equal(session.eval(ids, "last"), whole[-1:])
        for length, evaluated in ((1095, 1068), (1050, 1024), (700, 512), (400, 0)):
            session.rewind(len(session) - length)
            assert (len(session), session.evaluated) == (length, evaluated)
        np.testing.assert_array_equal(session.eval(ids[400:600]), whole[400:600])


def test_snapshots_of_a_model_without_recurrent_layers(small_model: Path, prompt: list[int]):
    with runtime.load(small_model) as model, model.session() as session:
        whole = model.eval(prompt)
        session.eval(prompt[:70])
        with session.snapshot() as snapshot:
            session.eval([1, 2, 3])
            session.restore(snapshot)
        np.testing.assert_array_equal(session.eval(prompt[70:]), whole[70:])
        session.rewind(100)
        assert session.evaluated == 50
        session.close()
        assert free(model)[0] == model._engine.pools.pages.count
