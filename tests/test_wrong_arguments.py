"""Every public call with every argument wrong, all others right.

What comes out is a `runtime.Error` of one line, at the call, and nothing has changed; or the value
was one the call can use. (For a keyword that does not exist Python's own TypeError stands.)
"""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import DEMO, needs_demo

import runtime
from runtime.model import Model
from runtime.session import Session

pytestmark = needs_demo


class TheirError(Exception):
    """What a caller's own object raises: it reaches the caller as it is."""


class Unprintable:
    def __repr__(self) -> str:
        raise TheirError


class Lying:
    """Looks like a whole number and like a list, and is neither."""

    def __index__(self) -> int:
        raise TheirError

    def __len__(self) -> int:
        raise TheirError

    def __iter__(self) -> Iterator[int]:
        raise TheirError


def _breaks() -> Iterator[int]:
    yield 1
    raise TheirError


# name -> a new such value for each call
VALUES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "zero": lambda: 0,
    "five": lambda: 5,
    "minus one": lambda: -1,
    "2**63": lambda: 2**63,
    "10**30": lambda: 10**30,
    "10**5000": lambda: 10**5000,
    "2.5": lambda: 2.5,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "1j": lambda: 1j,
    "True": lambda: True,
    "text of a number": lambda: "1",
    "empty text": lambda: "",
    "text with a zero": lambda: "a\0b",
    "a surrogate": lambda: "\ud800",
    "lines": lambda: "no\nsuch\nthing",
    "bytes": lambda: b"x",
    "path": lambda: Path("no such file"),
    "list": list,
    "list of None": lambda: [None],
    "list of text": lambda: ["a"],
    "list of floats": lambda: [2.5],
    "list of booleans": lambda: [True],
    "list of huge": lambda: [10**30],
    "list of minus one": lambda: [-1],
    "nested list": lambda: [[1, 2]],
    "dict": dict,
    "dict of text": lambda: {"a": "b"},
    "set": lambda: {1},
    "object": object,
    "class": lambda: Exception,
    "function": lambda: print,
    "generator": lambda: iter([1]),
    "generator that raises": _breaks,
    "module": lambda: os,
    "no repr": Unprintable,
    "lying": Lying,
    "uint8": lambda: np.uint8(64),
    "float32": lambda: np.float32(0.5),
    "numpy bool": lambda: np.bool_(True),
    "array 0-d": lambda: np.array(3),
    "array 1-d": lambda: np.array([1, 2]),
    "array 2-d": lambda: np.zeros((2, 2)),
    "array of ids, 2-d": lambda: np.ones((2, 2), np.int64),
    "array of objects": lambda: np.array([None, "x"]),
    "array of floats": lambda: np.array([1.5]),
}


class World:
    """Two models, sessions and a snapshot, and what they are like."""

    def __init__(self) -> None:
        self.model = runtime.load(DEMO, context=64, sequences=8, threads=1)
        self.other = runtime.load(DEMO, context=64, sequences=1, devices="null")
        self.session = self.model.session()
        self.session.eval([1, 2, 3], "none")
        self.closed = self.model.session()
        self.closed.close()
        self.foreign = self.other.session()
        self.snapshot = self.session.snapshot()
        self.gone = self.session.snapshot()
        self.gone.close()
        self.before = self.state()
        self.logits = self.model.eval([1, 2, 3])

    def values(self) -> dict[str, Callable[[], Any]]:
        """All values, the things of this package among them."""
        things = ("model", "closed", "foreign", "snapshot", "gone")
        own = {name: lambda name=name: getattr(self, name) for name in things}
        made = {"session": self.session.fork, "tokenizer": lambda: self.model.tokenizer}
        return {**VALUES, **own, **made}

    def state(self) -> tuple:
        return self.session.tokens, len(self.snapshot), self.free(), len(self.foreign)

    def free(self) -> int:
        return self.model._engine.pools.pages.available

    def close(self) -> None:
        self.model.close()
        self.other.close()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


def _load(name: str) -> Callable[[World, Any], Any]:
    def call(w: World, value: Any) -> None:
        runtime.load(**{"path": DEMO, "devices": "null", "threads": 1, name: value}).close()

    return call


def _keyword(method: str, name: str) -> Callable[[World, Any], Any]:
    """`generate` or `chat` with one keyword; an accepted value has to give an answer."""

    def call(w: World, value: Any) -> None:
        with getattr(w.model, method)("Hi", **{"max_tokens": 2, name: value}) as answer:
            if name not in ("session", "max_tokens", "on_token", "on_prompt"):
                assert isinstance(answer.text, str)

    return call


def _session(method: str, *right: Any) -> Callable[[World, Any], Any]:
    def call(w: World, value: Any) -> None:
        with w.session.fork() as session:
            before = session.tokens
            try:
                getattr(session, method)(*right, value)
            except runtime.Error:
                assert session.tokens == before
                raise

    return call


def _step(form: Callable[[World, Any], Any], **right: Any) -> Callable[[World, Any], Any]:
    def call(w: World, value: Any) -> None:
        with w.session.fork() as session:
            w.forked = session
            w.model.step(form(w, value), **right)

    return call


def _keywords(function: Any) -> list[str]:
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind == 3]


HI = [{"role": "user", "content": "Hi"}]
CALLS: dict[str, Callable[[World, Any], Any]] = {
    **{f"load {name}": _load(name) for name in inspect.signature(runtime.load).parameters},
    **{
        f"{method} {name}": _keyword(method, name)
        for method in ("generate", "chat")
        for name in _keywords(getattr(Model, method))
    },
    **{
        f"Sampling {field.name}": lambda w, v, name=field.name: runtime.Sampling(**{name: v})
        for field in fields(runtime.Sampling)
    },
    "generate prompt": lambda w, v: w.model.generate(v, max_tokens=2).text,
    "chat messages": lambda w, v: w.model.chat(v, max_tokens=2).text,
    "chat a message": lambda w, v: w.model.chat([v], max_tokens=2).text,
    "chat a role": lambda w, v: w.model.chat([{"role": v, "content": "Hi"}], max_tokens=2).text,
    "chat a content": lambda w, v: w.model.chat([{"role": "user", "content": v}]).close(),
    "warmup progress": lambda w, v: w.other.warmup(v),
    "graph tokens": lambda w, v: w.model.graph(v),
    "graph outputs": lambda w, v: w.model.graph(2, v),
    "eval ids": lambda w, v: w.model.eval(v),
    "eval logits": lambda w, v: w.model.eval([1], v),
    "step batch": _step(lambda w, v: v),
    "step an entry": _step(lambda w, v: [v]),
    "step a session": _step(lambda w, v: [(v, [1])]),
    "step ids": _step(lambda w, v: [(w.forked, v)]),
    "step a third": _step(lambda w, v: [(w.forked, [1], v)]),
    "step logits": lambda w, v: _step(lambda w, _: [(w.forked, [1])], logits=v)(w, None),
    "step on_prompt": lambda w, v: _step(lambda w, _: [(w.forked, [1])], on_prompt=v)(w, None),
    "Session.eval ids": _session("eval"),
    "Session.eval logits": _session("eval", [1]),
    "Session.eval on_prompt": _session("eval", [1], "all"),
    "Session.rewind n": _session("rewind"),
    "Session.restore snapshot": _session("restore"),
    "Session.save path": _session("save"),
    "Session.load model": lambda w, v: runtime.Session.load(v, "s.rt"),
    "Session.load path": lambda w, v: runtime.Session.load(w.model, v).close(),
    "Tokenizer.from_gguf": lambda w, v: runtime.Tokenizer.from_gguf(v),
    "Tokenizer metadata": lambda w, v: runtime.Tokenizer(v),
    "tokenizer()": lambda w, v: w.model.tokenizer(v),
    "encode text": lambda w, v: w.model.tokenizer.encode(v),
    "encode add_special": lambda w, v: w.model.tokenizer.encode("Hi", v),
    "encode parse_special": lambda w, v: w.model.tokenizer.encode("Hi", True, v),
    "decode ids": lambda w, v: w.model.tokenizer.decode(v),
    "decode skip_special": lambda w, v: w.model.tokenizer.decode([1], v),
    "token_text": lambda w, v: w.model.tokenizer.token_text(v),
    "token_bytes": lambda w, v: w.model.tokenizer.token_bytes(v),
    "is_control": lambda w, v: w.model.tokenizer.is_control(v),
    "stream skip_special": lambda w, v: w.model.tokenizer.stream(v),
    "stream strip_space": lambda w, v: w.model.tokenizer.stream(True, v),
    "stream feed": lambda w, v: w.model.tokenizer.stream().feed(v),
    "apply_chat_template": lambda w, v: w.model.tokenizer.apply_chat_template(v),
    **{
        f"apply_chat_template {name}": lambda w, v, name=name: (
            w.model.tokenizer.apply_chat_template(HI, **{name: v})
        )
        for name in ("tools", "tokenize", "add_generation_prompt", "template")
    },
}


def _raw_error(w: World, call: Callable[[World, Any], Any], value: Any) -> str | None:
    """What is wrong with what the call does with the value, if anything is."""
    try:
        call(w, value)
    except runtime.Error as error:
        text = str(error)
        return f"{len(text)} characters: {text!r:.80}" if "\n" in text or len(text) > 500 else None
    except TheirError:
        return None
    except BaseException as error:
        return f"{type(error).__name__}: {error!s:.100}"
    return None


@pytest.mark.parametrize("name", CALLS)
def test_wrong_values_are_one_clear_line(world: World, name: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where some names are fit for files and folders
    wrong = {}
    for what, make in world.values().items():
        told = _raw_error(world, CALLS[name], make())
        if told is not None:
            wrong[what] = told
        if world.state() != world.before:
            wrong[what] = f"changed the state: {world.before} -> {world.state()}"
            world.before = world.state()
    assert not wrong


def test_the_model_is_as_before(world: World):
    np.testing.assert_array_equal(world.model.eval([1, 2, 3]), world.logits)
    assert len(CALLS) * len(world.values()) >= 359


def test_what_is_closed_says_so():
    with runtime.load(DEMO, devices="null", context=64, sequences=2) as model:
        session, snapshot = model.session(), model.session().snapshot()
        answer = model.generate("Hi", session=session)
        waiting = model.generate("Hi")
    calls: list[Callable[[], Any]] = [
        *(lambda: session.eval([1]), session.fork, session.snapshot, lambda: session.rewind(0)),
        *(lambda: session.restore(snapshot), lambda: model.eval([1]), model.session),
        *(lambda: model.generate("Hi"), lambda: model.chat("Hi"), lambda: next(answer)),
        *(lambda: model.step([(session, [1])]), lambda: model.step([]), lambda: waiting.text),
    ]
    for call in calls:
        with pytest.raises(runtime.OptionError, match="closed"):
            call()
    for harmless in (session.close, snapshot.close, answer.close, waiting.close, model.close):
        harmless()
    assert isinstance(session, Session) and repr(session) and repr(snapshot) and repr(answer)
    assert list(itertools.islice(answer, 3)) == []
