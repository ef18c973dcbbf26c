"""An interrupt at every line of the engine: sessions are what they were or what they became.

Each case prepares sessions of a small model and names what is done with them. It is done once for
every line that it runs, with an interrupt before that line, and then everything is looked at: what
tokens the sessions have, whether their next logits are those of the same tokens evaluated anew,
and whether all pages and slots are free once they are closed.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from alarms import AlarmError
from interruptions import interrupted, lines_of
from small_models import NOVEL, Sizes, write_model

import runtime
from runtime.engine.advance import Piece
from runtime.errors import MemoryLimitError
from runtime.model import Model
from runtime.session import Session, Snapshot

PACKAGE = Path(runtime.__file__).parent
FILES = [
    str(PACKAGE / name)
    for name in (
        "session.py", "model.py", "generate.py", "generation.py", "engine/engine.py",
        "engine/advance.py", "engine/batch.py", "engine/pools.py", "engine/sequence.py",
        "engine/programs.py", "engine/prompts.py", "memory/eviction.py", "memory/holders.py",
        "memory/pages.py", "memory/prefix_edges.py", "memory/prefix_tree.py", "memory/slots.py",
    )
]  # fmt: skip
IDS = np.random.default_rng(4).integers(0, 80, 300).tolist()
STRIDE, SHORT = 5, 60  # of the default run, but for short cases; all lines are swept when asked for


class Case(NamedTuple):
    """Sessions with these numbers of tokens, what is made of them, and what is then done."""

    lengths: tuple[int, ...]
    action: Callable[..., Any]
    prepare: Callable[..., Any] = lambda model, *sessions: ()  # more sessions and snapshots


def fill(model: Model, *sessions: Session) -> list[Session]:
    """Sessions that hold every page but one."""
    found = []
    while (free := model._engine.pools.pages.available) > 1:
        found.append(model.session())
        found[-1].eval((IDS * 2)[: min(7, free - 1) * 32], "none")
    return found


def forked(model: Model, session: Session) -> list[Session]:
    return [session.fork(), session.fork()]


def gone_back(model: Model, session: Session) -> list[Session]:
    other = session.fork()
    other.rewind(5)
    return [other]


def snapped(model: Model, session: Session, *others: Session) -> list[Any]:
    snapshot = session.snapshot()
    session.eval(IDS[:3], "none")
    session.eval(IDS[:1], "none")
    return [snapshot]


def fails(model: Model, session: Session, *others: Session) -> None:
    with suppress(MemoryLimitError):
        model.step([(session, IDS[:70]), (others[0], [2])], "last")


def run_out(model: Model, *others: Session) -> list[Any]:
    """No slot is free, and the checkpoints of one sequence are all there is to drop."""
    pools = model._engine.pools
    found = [model.session() for _ in range(pools.slots.available)]
    for session in found:
        session.eval([1], "none")
    return found


CASES = {
    "prompt": Case((0,), lambda m, s: s.eval(IDS[:40])),
    "long prompt": Case((5,), lambda m, s: s.eval(IDS[:90], "last", lambda *at: None)),
    "a program's first step": Case(
        (3,), lambda m, s: s.eval([7, 8]), lambda m, *_: m._engine.programs._made.clear() or ()
    ),
    "decode": Case((40,), lambda m, s: s.eval([7], "last")),
    "decode into a new page": Case((63, 1), lambda m, s, o: s.eval([7], "last")),
    "decode after a fork": Case((40,), lambda m, s, *o: s.eval([7], "last"), forked),
    "fork": Case((40,), lambda m, s: s.fork()),
    "snapshot": Case((40,), lambda m, s: s.snapshot()),
    "rewind": Case((20, 20), lambda m, s, o: s.rewind(15)),
    "rewind to nothing": Case((40,), lambda m, s: s.rewind(40)),
    "eval after a rewind": Case(
        (70,), lambda m, s: s.eval([7, 8], "last"), lambda m, s: s.rewind(9) or ()
    ),
    "restore": Case((50,), lambda m, s, snapshot: s.restore(snapshot), snapped),
    "restore elsewhere": Case((50, 35), lambda m, s, o, snapshot: o.restore(snapshot), snapped),
    "close": Case((40, 3), lambda m, s, o: s.close()),
    "close a snapshot": Case((50,), lambda m, s, snapshot: snapshot.close(), snapped),
    "step": Case(
        (40, 33, 0), lambda m, a, b, c, *o: m.step([(a, [1]), (c, IDS[:20]), (b, [2, 3])], "last")
    ),
    "step of decodes": Case((40, 33), lambda m, *all: m.step([(s, [5]) for s in all])),
    "step of forks": Case((40,), lambda m, *all: m.step([(s, [5]) for s in all]), forked),
    "step with a fork that went back": Case(
        (40,), lambda m, *all: m.step([(s, [5]) for s in all]), gone_back
    ),
    "run": Case(
        (40, 33, 0),
        lambda m, *all: m._engine.run(
            [Piece(s._sequence, ids) for s, ids in zip(all, ([1], [2, 3], IDS[:20]), strict=True)]
        ),
    ),
    "run of forks": Case(
        (40,), lambda m, *all: m._engine.run([Piece(s._sequence, [5]) for s in all]), gone_back
    ),
    "no memory": Case((40,), fails, fill),
    "checkpoints give way": Case((70, 60), lambda m, a, b, *o: a.eval([1, 2]), run_out),
    "session": Case((3,), lambda m, s: m.session()),
    "model.eval": Case((3,), lambda m, s: m.eval([1, 2, 3])),
}


@pytest.fixture(scope="module", params=["dense", "hybrid"])
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Model, Model]]:
    """A model, and one more of the same file that says what is right."""
    size = Sizes(layers=1) if request.param == "dense" else replace(NOVEL["qwen35"], layers=2)
    path = write_model(tmp_path_factory.mktemp("interrupts") / "m.gguf", size)
    options = {"threads": 1, "context": 256, "sequences": 1}
    with runtime.load(path, **options) as model, runtime.load(path, **options) as right:
        model._engine.most_tokens = 32  # so that prompts of a few dozen tokens take several steps
        yield model, right


class Scene:
    """The sessions of a case, once."""

    def __init__(self, model: Model, right: Model, case: Case) -> None:
        self.model, self.right, self.case = model, right, case
        self.sessions: list[Any] = []
        for n in case.lengths:
            self.sessions.append(model.session())
            for at in range(0, n - 1, 30):
                self.sessions[-1].eval(IDS[at : min(n - 1, at + 30)], "none")
            if n:  # alone, so that a state is nobody else's, no checkpoint either
                self.sessions[-1].eval(IDS[n - 1 : n], "none")
        self.sessions += case.prepare(model, *self.sessions)

    def act(self) -> None:
        self.case.action(self.model, *self.sessions)

    def tokens(self) -> list[tuple[int, ...] | None]:
        """Of every session, None where it is closed."""
        return [None if s._sequence.record.closed else tuple(s.tokens) for s in self.sessions]

    def free(self, wanted: tuple[int, int] = (0, 0)) -> tuple[int, int]:
        """Free pages and slots; where less than wanted, after a collection, which takes long."""
        pools = self.model._engine.pools
        if pools.pages.available < wanted[0] or pools.slots.available < wanted[1]:
            gc.collect()
        return pools.pages.available, pools.slots.available

    def check_logits(self) -> None:
        """The next logits of all that can go on, in one step and then one by one."""
        left = [s for s in self.sessions if not s._sequence.record.closed]
        for session in left[3:]:
            session.close()  # what is only there to fill the pools
        going = [s if isinstance(s, Session) else self._restored(s) for s in left[:3]]
        rows = self.model.step([(s, [9]) for s in going])
        for session, row in zip(going, rows, strict=True):
            np.testing.assert_array_equal(row, self._expected(session))
            np.testing.assert_array_equal(session.eval([3], "last"), self._expected(session))
            session.close()
        for session in going:
            self._check_cached(session.tokens)

    def _check_cached(self, tokens: list[int]) -> None:
        """What the cache of prompts has of them, whether or not it was interrupted."""
        engine = self.model._engine
        with engine.alone():
            record, _ = engine.prompts.start([*tokens, 3])
            session = Session(self.model, record)
        session.eval([*tokens, 3][len(session) :], "none")
        np.testing.assert_array_equal(session.eval([1], "last"), self._expected(session))
        session.close()

    def _restored(self, snapshot: Snapshot) -> Session:
        session = self.model.session()
        session.restore(snapshot)
        return session

    def _expected(self, session: Session) -> np.ndarray:
        key = tuple(session.tokens)
        if (self.right, key) not in _right:
            _right[self.right, key] = self.right.eval(key, "last")
        return _right[self.right, key]

    def close(self) -> None:
        for session in self.sessions:
            session.close()
        self.model._engine.prompts.clear()


_right: dict[Any, np.ndarray] = {}


def sweep(models: tuple[Model, Model], case: Case, stride: int, steady: bool = True) -> int:
    """Interrupts before every stride-th line of a case; how many lines there were.

    steady: whether it runs the same lines each time.
    """
    model = models[0]
    everything = model._engine.pools.pages.count, model._engine.pools.slots.count
    with collected_between_scenes() as collect:
        for _ in range(2):  # the first time programs are made, which is a case of its own
            collect()
            scene = Scene(*models, case)
            old, free_old = scene.tokens(), scene.free()
            total = lines_of(scene.act, FILES)
            new, free_new = scene.tokens(), scene.free()
            scene.check_logits()
            scene.close()
            assert scene.free(everything) == everything
        for line in range(0, total, stride if total > SHORT else 1):
            collect()
            scene = Scene(*models, case)
            assert scene.tokens() == old and scene.free(free_old) == free_old
            where = interrupted(scene.act, FILES, line)
            assert where or not steady, f"line {line} of {total} was not reached"
            assert not model._engine.lock._is_owned(), f"{where}: the model stays locked"
            assert scene.tokens() in (old, new), where
            least = min(free_old[0], free_new[0]), min(free_old[1], free_new[1])
            found = scene.free(least)
            assert found[0] >= least[0] and found[1] >= least[1], where
            scene.check_logits()
            scene.close()
            assert scene.free(everything) == everything, where
    return total


@contextmanager
def collected_between_scenes() -> Iterator[Callable[[], Any]]:
    """Only there is garbage collected, by the function given: holders that die in the midst of a
    step, at a time that depends on all that ran before, would change how many lines it has."""
    gc.collect()
    gc.disable()
    try:
        yield lambda: gc.collect(0)
    finally:
        gc.enable()


@pytest.mark.parametrize("name", CASES)
def test_an_interrupt_leaves_the_old_state_or_the_new_one(models: tuple[Model, Model], name: str):
    assert sweep(models, CASES[name], STRIDE) >= 5


@pytest.mark.sweep
@pytest.mark.parametrize("name", CASES)
def test_an_interrupt_at_every_line(models: tuple[Model, Model], name: str):
    print(name, sweep(models, CASES[name], 1), "lines")


STORM: list[Callable[[Model, int, Session, Session, Snapshot], Any]] = [
    lambda model, n, session, other, snapshot: session.eval(IDS[:n], "last"),
    lambda model, n, session, other, snapshot: session.eval([n], "last"),
    lambda model, n, session, other, snapshot: session.rewind(n % len(session)),
    lambda model, n, session, other, snapshot: session.restore(snapshot),
    lambda model, n, session, other, snapshot: session.snapshot().close(),
    lambda model, n, session, other, snapshot: session.fork().eval([n], "none"),
    lambda model, n, session, other, snapshot: model.step([(session, [n]), (other, IDS[:5])]),
]


def storm(models: tuple[Model, Model], alarm: Callable[[float], None], enough: int) -> int:
    """Random operations under real signals at random times, until so many were broken off; how
    many that were, of at most a hundred times as many."""
    model, right = models
    rng, broken = random.Random(5), 0
    sessions = [model.session() for _ in range(3)]
    model.step([(s, IDS[:20]) for s in sessions])
    snapshot = sessions[0].snapshot()
    for _ in range(100 * enough):
        if broken == enough:
            break
        session, other = rng.sample(sessions, 2)
        try:
            alarm(rng.uniform(2e-5, 2e-3))
            rng.choice(STORM)(model, rng.randrange(1, 40), session, other, snapshot)
            alarm(0)
        except AlarmError:
            broken += 1
        finally:
            alarm(0)
        assert not model._engine.lock._is_owned()
        if len(session) > 80:
            session.rewind(len(session) - 5)
        row = session.eval([9])
        np.testing.assert_array_equal(row, right.eval(session.tokens, "last"))
    for holder in (*sessions, snapshot):
        holder.close()
    gc.collect()
    pools = model._engine.pools
    assert (pools.pages.available, pools.slots.available) == (pools.pages.count, pools.slots.count)
    return broken


def test_real_signals(models: tuple[Model, Model], alarm: Callable[[float], None]):
    assert storm(models, alarm, 12) == 12


@pytest.mark.sweep
def test_many_real_signals(models: tuple[Model, Model], alarm: Callable[[float], None]):
    assert storm(models, alarm, 2_000) == 2_000


@pytest.fixture(scope="module")
def demos() -> Iterator[tuple[Model, Model]]:
    options = {"threads": 1, "context": 256, "sequences": 1}
    with runtime.load(**options) as model, runtime.load(**options) as right:
        yield model, right


ANSWERS = {
    "generate": lambda m, s: m.generate("Pip", session=s, max_tokens=3, temperature=0).text,
    "chat": lambda m, s: m.chat("Hi", session=s, max_tokens=2, seed=1, logprobs=1).text,
}


def sweep_answer(demos: tuple[Model, Model], name: str, stride: int) -> int:
    """Interrupts before every stride-th line of an answer, in a session given and in its own."""
    model, right = demos
    pages, whole = model._engine.pools.pages.count, None
    for line in (-1, -1, *range(0, 10**6, stride)):
        with model.session() as session:
            session.eval([1, 2, 3, 4, 5], "none")
            where = interrupted(lambda: ANSWERS[name](model, session), FILES, line)
            if line == -1:
                whole = session.tokens
            elif not where:
                break
            assert session.tokens in ([1, 2, 3, 4, 5], whole[: len(session)]), where
            known = (*session.tokens, 9)
            np.testing.assert_array_equal(session.eval([9]), right.eval(known, "last"))
            interrupted(lambda: ANSWERS[name](model, None), FILES, line)
        pool = model._engine.pools.pages
        if pool.available < pages:
            gc.collect()
        assert pool.available == pages and not model._engine.lock._is_owned(), where
        model._engine.prompts.clear()
    return line


@pytest.mark.parametrize("name", ANSWERS)
def test_an_interrupted_answer_leaves_a_session_that_goes_on(demos: tuple[Model, Model], name: str):
    assert sweep_answer(demos, name, 37) > 200


@pytest.mark.sweep
@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_interrupted_at_every_line(demos: tuple[Model, Model], name: str):
    print(name, sweep_answer(demos, name, 1), "lines")
