"""Wrong arguments to methods of models and sessions: one clear line, and nothing has changed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime
from runtime.errors import Error, FileError, OptionError
from runtime.model import Model
from runtime.session import Session

THINGS: list[Any] = [
    None, True, -1, 10**30, 1.5, float("nan"), "1", b"1", object(), [], {}, {1, 2}, [None], [True],
    [1.5], ["1"], [[1, 2]], [-1], [10**30], np.zeros((2, 3), int), np.array(3), np.array([1.5]),
    np.array([True]), np.bool_(True), {"a": 1}, len, Ellipsis, 1j,
]  # fmt: skip


@pytest.fixture(scope="module")
def model(small_model: Path) -> Iterator[Model]:
    with runtime.load(small_model, devices="null", context=64) as loaded:
        yield loaded


def _calls(model: Model, session: Session) -> dict[str, Any]:
    """Every method that takes an argument, by what is wrong with `x`."""
    snapshot = session.snapshot()
    return {
        "eval": session.eval, "model.eval": model.eval,
        "logits": lambda x: session.eval([1], logits=x),
        "on_prompt": lambda x: x is None or callable(x) or session.eval([1], on_prompt=x),
        "rewind": session.rewind, "restore": session.restore,
        "step": model.step, "pair": lambda x: model.step([x]),
        "session of a pair": lambda x: model.step([(x, [1])]),
        "snapshot of a pair": lambda x: model.step([(snapshot, [1])]),
        "ids of a pair": lambda x: model.step([(session, x)]),
        "graph": model.graph, "graph's outputs": lambda x: model.graph(4, x),
        "Session": lambda x: Session(model, x), "Snapshot": lambda x: runtime.Snapshot(x, x),
    }  # fmt: skip


def test_wrong_types_are_refused_in_one_line(model: Model):
    with model.session() as session:
        session.eval([1, 2])
        taken = []
        for name, call in _calls(model, session).items():
            for thing in THINGS:
                try:
                    call(thing)
                    taken.append((name, thing))
                except Error as error:
                    assert "\n" not in str(error) and len(str(error)) < 300, (name, thing)
                assert len(session) == 2, (name, thing)
    none, empty = ("on_prompt", None), ("step", [])
    assert taken == [none, ("on_prompt", len), empty, ("graph's outputs", None)]


def test_an_iterable_works_once(model: Model):
    with model.session() as a, model.session() as b:
        rows = model.step((s, iter(ids)) for s, ids in ((a, [1, 2]), (b, (3,))))
        assert [r.shape[0] for r in rows] == [2, 1]
        assert (a.tokens, b.tokens) == ([1, 2], [3])
        assert model.step([]) == [] == model.step(iter(()))
        a.eval(np.array([4, 5], np.uint8), "none")
        a.eval(range(6, 8), "none")
        assert a.tokens == [1, 2, 4, 5, 6, 7] and {type(i) for i in a.tokens} == {int}
        a.rewind(np.int16(4))
        assert a.tokens == [1, 2]
        a.tokens.append(9)
        assert a.tokens == [1, 2], "a list of the caller's own"


def test_what_a_generator_raises_comes_through(model: Model):
    def broken() -> Iterator[int]:
        yield 1
        raise KeyError("mine")

    with model.session() as session, pytest.raises(KeyError, match="mine"):
        session.eval(broken())


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_and_pickles_say_what_to_do(model: Model, way: Any):
    free = model._engine.pools.pages.available
    with model.session() as session:
        session.eval([1, 2])
        with session.snapshot() as snapshot:
            for thing in (session, snapshot):
                with pytest.raises(OptionError, match=r"session\.fork\(\) makes a second"):
                    way(thing)
        with pytest.raises(OptionError, match=r"runtime\.load"):
            way(model)
        if way is not copy.copy:  # a second name of the same file
            with pytest.raises(FileError, match="an open file cannot be copied or pickled"):
                way(model.file)
        assert session.tokens == [1, 2]
    assert model._engine.pools.pages.available == free


def test_on_prompt_cannot_use_the_model(model: Model):
    with model.session() as session, model.session() as other:
        uses = (
            model.session, lambda: other.eval([1]), other.fork, other.snapshot, model.close,
            lambda: session.rewind(0),
        )  # fmt: skip
        for use in uses:
            with pytest.raises(OptionError, match="a step of this model is under way"):
                session.eval([1, 2], on_prompt=lambda *_, use=use: use())
            assert not len(session) and not len(other)
        session.eval([1, 2], on_prompt=lambda *_: session.close())
        with pytest.raises(OptionError, match="this session is closed"):
            session.eval([3])


def test_public_names_are_those_a_user_needs(model: Model):
    names = {n for n in dir(model) if not n.startswith("_")}
    assert names == {
        "architecture", "backend", "cache_rotation", "chat", "close", "context", "draft", "eval",
            "file",
        "generate", "graph", "kv_types", "memory", "perplexity", "sampling_defaults", "session",
        "spec", "step", "submit", "threads", "together", "tokenizer", "vocab_size", "warmup",
    }  # fmt: skip
    with model.session() as session:
        assert {n for n in dir(session) if not n.startswith("_")} == {
            "close", "eval", "evaluated", "fork", "load", "model", "restore", "rewind", "save",
            "snapshot", "tokens",
        }  # fmt: skip
