"""Engine.run: one native step of pieces, each with its own rows or its own error; and eviction."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from small_models import NOVEL, Sizes, write_model

import runtime
from runtime.engine.advance import Piece
from runtime.engine.sequence import Record
from runtime.errors import Error, MemoryLimitError, OptionError
from runtime.memory.holders import Evictable
from runtime.memory.pages import Pages
from runtime.model import Model
from runtime.ops import PAGE
from runtime.session import Session

IDS = np.random.default_rng(6).integers(0, 80, 256).tolist()


@pytest.fixture(scope="module", params=["dense", "hybrid"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Model]:
    size = Sizes(layers=2) if request.param == "dense" else NOVEL["qwen35"]
    path = write_model(tmp_path_factory.mktemp("run") / "m.gguf", size)
    with runtime.load(path, threads=1, context=256, sequences=2, prompt_cache=False) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def whole(model: Model) -> np.ndarray:
    return model.eval(IDS)


@pytest.fixture(autouse=True)
def nothing_leaks(model: Model) -> Iterator[None]:
    before = _free(model)
    yield
    assert _free(model) == before


def _free(model: Model) -> tuple[int, int]:
    pools = model._engine.pools
    return pools.pages.free, pools.slots.free


def _run(model: Model, *pieces: tuple[Session, list[int], object]) -> list[np.ndarray | Error]:
    return model._engine.run([Piece(s._sequence, ids, rows) for s, ids, rows in pieces])  # type: ignore[arg-type]


def test_rows_of_a_piece_that_takes_several_steps(model: Model, whole: np.ndarray):
    """A state is kept near its end, so a step ends there."""
    wanted = [0, 50, 80, 99]
    with model.session() as session, model.session() as other:
        last, rows = _run(model, (other, IDS[:90], "last"), (session, IDS[:100], wanted))
    np.testing.assert_array_equal(rows, whole[wanted])
    np.testing.assert_array_equal(last, whole[[89]])


def test_each_piece_has_the_rows_it_wants(model: Model, whole: np.ndarray):
    a, b, c, d, e = (model.session() for _ in range(5))
    found = _run(
        model, (a, IDS[:5], "all"), (b, IDS[:33], "none"), (c, IDS[:9], [0, 3, 8]),
        (d, IDS[:1], "last"), (e, IDS[:4], []),
    )  # fmt: skip
    for rows, places in zip(found, [range(5), [], [0, 3, 8], [0], []], strict=True):
        np.testing.assert_array_equal(rows, whole[list(places)])
    found = _run(model, (c, IDS[9:10], "last"), (b, IDS[33:40], [5]), (a, IDS[5:7], "last"))
    for rows, place in zip(found, [9, 38, 6], strict=True):
        np.testing.assert_array_equal(rows, whole[[place]])
    assert [len(s) for s in (a, b, c, d, e)] == [7, 40, 10, 1, 4]
    assert c.tokens == IDS[:10]
    for session in (a, b, c, d, e):
        session.close()


def test_nobody_waits_for_a_long_prompt(
    model: Model, whole: np.ndarray, monkeypatch: pytest.MonkeyPatch
):
    """A prompt in pieces beside a decode: a row for the decode from every native step."""
    steps: list[int] = []
    execute = model._engine._execute

    def counted(program, inputs, live):
        steps.append(live["tokens"])
        return execute(program, inputs, live)

    monkeypatch.setattr(model._engine, "_execute", counted)
    with model.session() as decode, model.session() as prompt:
        for n in range(4):
            row, nothing = _run(
                model, (decode, IDS[n : n + 1], "last"), (prompt, IDS[50 * n :][:50], "none")
            )
            np.testing.assert_array_equal(row, whole[n : n + 1])
            assert len(nothing) == 0
        np.testing.assert_array_equal(prompt.eval(IDS[200:]), whole[200:])
    assert steps == [51] * 4 + [56]


def test_after_a_rewind_rows_are_those_of_the_new_tokens(model: Model, whole: np.ndarray):
    with model.session() as session, model.session() as other:
        for at in range(0, 80, 20):
            session.eval(IDS[at : at + 20], "none")
        session.rewind(13)
        found = _run(model, (other, IDS[:2], "all"), (session, IDS[67:90], [0, 22]))
        np.testing.assert_array_equal(found[0], whole[:2])
        np.testing.assert_array_equal(found[1], whole[[67, 89]])


def test_what_is_wrong_with_one_is_not_wrong_with_the_others(model: Model, whole: np.ndarray):
    closed, full, good, also = (model.session() for _ in range(4))
    full.eval(IDS[:250], "none")
    closed.close()
    empty: list[int] = []
    found = _run(
        model, (closed, [1], "last"), (good, IDS[:40], "last"), (full, IDS[:7], "last"),
        (model.session(), empty, "last"), (model.session(), [80], "all"), (also, IDS[:3], "all"),
    )  # fmt: skip
    for at, says in {
        0: "this session is closed", 2: "250 . 7 tokens do not fit in context=256",
        3: "no tokens", 4: "token id 80 is outside",
    }.items():  # fmt: skip
        with pytest.raises((OptionError, MemoryLimitError), match=says):
            raise found[at]  # type: ignore[misc]
    np.testing.assert_array_equal(found[1], whole[39:40])
    np.testing.assert_array_equal(found[5], whole[:3])
    assert full.tokens == IDS[:250] and good.tokens == IDS[:40]
    np.testing.assert_array_equal(full.eval(IDS[250:]), whole[250:])
    for session in (full, good, also):
        session.close()


def test_who_has_no_memory_is_told_and_the_others_go_on(model: Model, whole: np.ndarray):
    filler = [model.session() for _ in range(5)]
    for session in filler:
        session.eval(IDS[:251], "none")
    first, greedy, last = model.session(), model.session(), model.session()
    first.eval(IDS[:31], "none")
    free = _free(model)[0]
    assert free == 48 - 5 * 8 - 1
    ids = {first: IDS[31:35], greedy: IDS[: 32 * free], last: IDS[:40]}
    found = _run(model, *((session, given, "last") for session, given in ids.items()))
    np.testing.assert_array_equal(found[0], whole[34:35])
    np.testing.assert_array_equal(found[2], whole[39:40])
    with pytest.raises(MemoryLimitError, match="all 48 pages of the KV cache"):
        raise found[1]  # type: ignore[misc]
    assert [len(s) for s in (first, greedy, last)] == [35, 0, 40]
    assert _free(model)[0] == free - 1 - 2
    filler.pop().close()
    np.testing.assert_array_equal(greedy.eval(ids[greedy], "last"), whole[[32 * free - 1]])
    for session in (*filler, first, greedy, last):
        session.close()


def test_who_has_no_slot_is_told_and_the_others_go_on(model: Model, whole: np.ndarray):
    if not model._engine.memory.slots:
        pytest.skip("no recurrent layers")
    first = model.session()
    first.eval(IDS[:3], "none")
    snapshots = []
    while _free(model)[1]:  # a slot for each, and nothing that could give way
        other = model.session()
        other.eval([1], "none")
        snapshots.append(other.snapshot())
        other.close()
    late = model.session()
    found = _run(model, (late, IDS[:2], "all"), (first, IDS[3:4], "all"))
    np.testing.assert_array_equal(found[1], whole[3:4])
    with pytest.raises(MemoryLimitError, match="slots of recurrent state"):
        raise found[0]  # type: ignore[misc]
    assert late.tokens == [] and first.tokens == IDS[:4]
    snapshots.pop().close()
    np.testing.assert_array_equal(late.eval(IDS[:2]), whole[:2])
    for holder in (*snapshots, first, late):
        holder.close()


def test_a_step_holds_so_much_and_says_so(model: Model, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model._engine, "most_tokens", 64)
    monkeypatch.setattr(model._engine, "most_rows", 8)
    with model.session() as session:
        session.eval(IDS[:3], "none")
        for ids, rows, says in (
            (
                IDS[:65],
                "last",
                "65 tokens and 1 rows of logits in one step .* most is 64 and 8",
            ),
            (IDS[:9], "all", "9 tokens and 9 rows of logits"),
        ):
            with pytest.raises(OptionError, match=says):
                _run(model, (session, ids, rows))
        for rows in ([0, 5], [1, 1], [-1], [2, 0]):
            [found] = _run(model, (session, IDS[:5], rows))
            assert "must be rising places of 5 ids" in str(found)
        with pytest.raises(OptionError, match="stands twice"):
            _run(model, (session, [1], "last"), (session, [2], "last"))
        assert session.tokens == IDS[:3] == session.tokens[: session.evaluated]
        assert _run(model) == []


class PromptCache(Evictable):
    """A fake: whole pages of prompts, the state at their ends, and the last used first to go."""

    def __init__(self, model: Model) -> None:
        self.model, self.held = model, dict[tuple[int, ...], Record]()
        self.asked: list[tuple[int, int]] = []
        model._engine.pools.holders.add(self)

    def keep(self, session: Session) -> None:
        """Its tokens up to the last whole page (of a hybrid: all, as that is where a state is)."""
        record = session._sequence.share()
        length = record.length if record.state else record.length // PAGE * PAGE
        state = record.state.alone() if record.state else None
        kept = record.cut(length)._replace(state=state).copy()
        self.held = {**self.held, tuple(kept.tokens): kept}

    def session(self, tokens: list[int]) -> Session:
        """One that goes on after the longest prompt in the cache that begins `tokens`."""
        fits = [key for key in self.held if list(key) == tokens[: len(key)]]
        record = self.held[max(fits, key=len)]
        pages = Pages.room(self.model.context, record.pages.held)
        return Session(self.model, record.copy()._replace(pages=pages))

    def held_pages(self) -> np.ndarray:
        return np.unique(np.concatenate([[], *(r.pages.held for r in self.held.values())])).astype(
            int
        )

    def held_slots(self) -> set[int]:
        return {r.state.slot for r in self.held.values() if r.state}

    def evict(self, pages: int, slots: int) -> bool:
        self.asked.append((pages, slots))
        last = next(iter(self.held), None)
        self.held = {key: kept for key, kept in self.held.items() if key != last}
        return last is not None

    def close(self) -> None:
        self.held = {}


def _filled(model: Model, prompts: list[list[int]]) -> PromptCache:
    cache = PromptCache(model)
    for prompt in prompts:
        with model.session() as session:
            session.eval(prompt, "none")
            cache.keep(session)
    return cache


def test_a_cache_shares_pages_with_sessions(model: Model, whole: np.ndarray):
    cache = _filled(model, [IDS[:100]])
    held = len(cache.held_pages())
    assert held == len(cache.held_pages()) and _free(model)[0] == 48 - held
    with cache.session(IDS) as session, cache.session(IDS) as other:
        assert len(session) in (96, 100) and _free(model)[0] == 48 - held
        at = len(session)
        np.testing.assert_array_equal(session.eval(IDS[at:120]), whole[at:120])
        other.eval(IDS[:10], "none")  # writes to no page of theirs
        cache.close()
        np.testing.assert_array_equal(session.eval(IDS[120:140]), whole[120:140])


def test_a_cache_gives_way_under_pressure_and_only_then(model: Model, whole: np.ndarray):
    pools = model._engine.pools
    prompts = [[n, *IDS[1:160]] for n in range(6)]
    want = model.eval([*prompts[0], 7], "last")
    cache = _filled(model, prompts)
    assert pools.pages.free == 48 - 6 * 5 and pools.pages.available == 48
    shared = cache.session(prompts[0])
    assert shared.tokens == prompts[0] and pools.pages.available == 48 - 5
    sessions = [model.session() for _ in range(4)]
    for n, session in enumerate(sessions):
        np.testing.assert_array_equal(session.eval(IDS[:250], "last"), whole[249:250])
        assert bool(cache.asked) == (n > 1), "only when there were not pages enough"
    assert 0 < len(cache.held) < 6 and tuple(prompts[0]) not in cache.held
    assert pools.pages.available == 48 - 5 - 4 * 8
    np.testing.assert_array_equal(shared.eval([7], "last"), want)
    while len(sessions) < 50 and len(sessions[-1]):
        sessions.append(model.session())
        found = _run(model, (sessions[-1], IDS[:32], "none"))[0]
    assert isinstance(found, MemoryLimitError) and "pages of the KV cache" in str(found)
    assert not cache.held and pools.pages.free == 0, "everything was given up before the error"
    for session in (shared, *sessions):
        session.close()


def test_a_cache_gives_slots_up_before_sessions_do(model: Model):
    slots = model._engine.pools.slots
    if not slots.count:
        pytest.skip("no recurrent layers")
    cache = _filled(model, [[n, 1, 2] for n in range(10)])
    with model.session() as session:
        for at in range(0, 45, 15):
            session.eval(IDS[at : at + 15], "none")
        kept = session._sequence.checkpoints
        sessions = [model.session() for _ in range(slots.free)]
        for other in sessions:
            other.eval([3], "none")
        assert slots.free == 0 and slots.available == 10 and not cache.asked
        with model.session() as late:
            late.eval([3], "none")
            assert cache.asked == [(0, 1)] and len(cache.held) == 9
        assert session._sequence.checkpoints == kept != []
    for other in sessions:
        other.close()
