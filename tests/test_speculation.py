"""Drafts change no bit: answers and sessions are those without them, whoever drafts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from choosing_cpu import speaking
from interruptions import interrupted, lines_of
from small_models import NOVEL, Sizes

import runtime
from runtime.engine import drafted as drafted_file
from runtime.generation import Generation
from runtime.model import Model
from runtime.speculation import speculation as speculation_file
from runtime.speculation.lengths import Lengths
from runtime.speculation.speculation import MOST

PROMPT = list(range(40, 75))
GREEDY = {"temperature": 0}
WARM = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 3}
ALL = {
    "seed": 5, "temperature": 1.2, "dynatemp_range": 0.5, "repeat_penalty": 1.3,
    "presence_penalty": 0.2, "frequency_penalty": 0.1, "dry_multiplier": 0.8,
    "xtc_probability": 0.4, "xtc_threshold": 0.02, "typical_p": 0.95, "top_n_sigma": 3.0,
    "logit_bias": {41: 2.0, 50: -3.0}, "logprobs": 3, "stop": ["zq", "\x00\x01"],
}  # fmt: skip
MIROSTAT = {"mirostat": 2, "seed": 7}


class Guessing:
    """Drafts the tokens it is told, each right with some chance, as many as it likes."""

    kind, free, most = "guess", True, 15

    def __init__(self, right: Sequence[int], chance: float, seed: int = 0, long: bool = False):
        self.right, self.chance, self.long = right, chance, long
        self.random = random.Random(seed)
        self.certainty = 0
        self.closed = 0
        self.most_behind = (
            63 if chance < 1 else MOST
        )  # tokens of which recurrent layers know nothing

    def begin(self, tokens: Sequence[int]) -> None:
        self.begun = len(tokens)

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        at = len(tokens)
        r = self.random
        found = []
        for i in range(most + 40 if self.long else r.randint(0, most)):
            known = at + i < len(self.right) and r.random() < self.chance
            found.append(self.right[at + i] if known else r.randrange(-3, 400))
        return found

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(autouse=True)
def as_many_as_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lengths, "best", lambda self, room, certainty, each=0.0: (room.drafts, 1.0))


@pytest.fixture(scope="module", params=["dense", "hybrid"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Model]:
    size = NOVEL["qwen35"] if request.param == "hybrid" else Sizes("qwen3", layers=2)
    path = speaking(tmp_path_factory.mktemp("speculation"), size)
    with runtime.load(path, context=256, threads=1, progress=False, spec="off") as made:
        yield made


def state_of(session: runtime.Session) -> tuple[Any, ...]:
    """What is left of an answer in its session."""
    checkpoints = [(c.place, c.message_end) for c in session._sequence.checkpoints]
    return session.tokens, session.evaluated, checkpoints, session._sequence.record.pages.used


def answered(
    model: Model, drafter: Guessing | None = None, stop_after: int | None = None, **options: Any
) -> tuple[Any, ...]:
    """Everything that can be seen of an answer, and of its session meanwhile and afterwards."""
    seen: list[Any] = []
    with model.session() as session:
        session.eval(PROMPT[:9])

        def told(token: Any) -> None:
            seen.append((token, session.tokens))
            behind = len(session) - session.evaluated
            assert drafter is None or behind <= drafter.most_behind

        answer = model.generate(PROMPT[9:], session=session, on_token=told, **options)
        speculating(answer, drafter)
        for piece in answer:
            seen.append((piece, len(session)))
            if stop_after is not None and len(answer.tokens) > stop_after:
                answer.close()
        if stop_after is not None and session._sequence.record.state is not None:
            model._engine.settle(session._sequence)
        after = state_of(session)
        session.rewind(max(0, len(session) + 2 - model.context))
        rows = session.eval([3, 4], "all").tobytes()
        return seen, answer.reason, answer.tokens, answer.logprobs, after, rows


def read(answer: Generation) -> list[int]:
    assert answer.text
    return answer.tokens


def speculating(answer: Generation, drafter: Any) -> Generation:
    answer._writing.options = answer._writing.options._replace(
        drafters=drafter and (lambda _: [drafter])
    )
    return answer


CASES = {
    "greedy": GREEDY | {"max_tokens": 90},
    "warm": WARM | {"max_tokens": 70},
    "all": ALL | {"max_tokens": 60},
    "mirostat": MIROSTAT | {"max_tokens": 40},
    "context": WARM | {"seed": 11, "ignore_eos": True},
    "one": GREEDY | {"max_tokens": 1},
    "two": GREEDY | {"max_tokens": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_whoever_drafts_the_answer_is_the_same(model: Model, case: str):
    options = CASES[case]
    plain = answered(model, **options)
    right = [*PROMPT, *plain[2]]
    free = model._engine.pools.pages.available, model._engine.pools.slots.available
    guesses = [(1, False), (1, True), (0.8, False), (0.5, True), (0, True)]
    for n, (chance, long) in enumerate(guesses):
        drafter = Guessing(right, chance, n, long)
        found = answered(model, drafter, **options)
        for a, b in zip(found, plain, strict=True):
            assert a == b, (chance, long)
        assert drafter.closed
    assert (model._engine.pools.pages.available, model._engine.pools.slots.available) == free


def test_an_answer_ends_among_drafts(model: Model):
    """At a stop string in the middle of them."""
    text = "".join(p for p, n in answered(model, **WARM, max_tokens=60)[0] if isinstance(p, str))
    for at in (20, 31):
        options = WARM | {"max_tokens": 60, "stop": [text[at : at + 3]]}
        plain = answered(model, **options)
        assert plain[1] == "stop"
        right = [*PROMPT, *plain[2], *range(20)]
        assert answered(model, Guessing(right, 1, long=True), **options) == plain


def test_what_was_drafted_is_counted(model: Model):
    plain = read(model.generate(PROMPT, max_tokens=41, **WARM))
    answer = model.generate(PROMPT, max_tokens=41, **WARM)
    speculating(answer, Guessing([*PROMPT, *plain], 1, long=True))
    assert answer.speculation is None and read(answer) == plain
    done = answer.speculation
    assert done is not None and done.drafted == done.accepted == 40 - done.steps
    assert done.steps <= 4 and done.kinds == {"guess": done.drafted}


def test_an_answer_that_is_left_leaves_what_it_would(model: Model):
    options = WARM | {"max_tokens": 60}
    right = [*PROMPT, *answered(model, **options)[2]]
    for after in (0, 3, 17):
        plain = answered(model, None, after, **options)
        assert answered(model, Guessing(right, 0.9, after), after, **options) == plain


def test_a_session_used_in_between_goes_on_as_it_would(model: Model):
    """Forked, its tokens read, or its last one evaluated once more while drafts wait."""

    def run(drafter: Guessing | None) -> list[Any]:
        seen: list[Any] = []
        with model.session() as session:
            answer = model.generate(PROMPT, session=session, max_tokens=50, **WARM)
            speculating(answer, drafter)
            for n, piece in enumerate(answer):
                seen.append(piece)
                if n % 3 == 1:
                    with session.fork() as fork:
                        seen.append(fork.eval([7], "last").tobytes())
                if n % 5 == 2:
                    last = session.tokens[-1]
                    session.rewind(1)
                    session.eval([last])
                if n % 7 == 3:
                    with session.snapshot() as kept:
                        session.restore(kept)
            seen.append(session.tokens)
        return seen

    plain = run(None)
    right = [*PROMPT, *plain[-1][len(PROMPT) :], 0]
    drafter = Guessing(right, 1, long=True)
    assert run(drafter) == plain


def test_memory_goes_to_who_needs_it(model: Model):
    """Drafts that wait hold no page or slot that others cannot have."""
    plain = read(model.generate(PROMPT, max_tokens=40, **WARM))
    pages = model._engine.pools.pages
    with model.session() as session:
        answer = model.generate(PROMPT, session=session, max_tokens=40, **WARM)
        drafter = Guessing([*PROMPT, *plain], 1, long=True)
        assert next(speculating(answer, drafter)) is not None
        while len(session) % 32 < 25:
            next(answer)
        assert pages.available == pages.count - session._sequence.record.pages.used
        assert pages.free < pages.available  # what waits has the next one
        others = list[runtime.Session]()
        while pages.available:
            others.append(model.session())
            others[-1].eval([5] * min(256, 32 * pages.available), "none")
        for other in others:
            other.close()
        assert read(answer) == plain


def test_the_cache_of_prompts_keeps_what_it_would(model: Model):
    """Also of pages that are full in the middle of drafts, and of nothing that did not follow."""
    plain = read(model.generate(PROMPT, max_tokens=80, **WARM))
    found = []
    for chance in (None, 1, 0.7):
        model._engine.prompts.clear()
        answer = model.generate(PROMPT, max_tokens=80, **WARM)
        if chance is not None:
            speculating(answer, Guessing([*PROMPT, *plain], chance, 2, long=True))
        assert read(answer) == plain
        again = model.generate([*PROMPT, *plain[:70], 7, 8], max_tokens=3, spec="off", **WARM)
        found.append((read(again), again.cached_tokens))
    assert found[1] == found[0] and found[2][0] == found[0][0] and found[0][1] > 32
    if model._engine.memory.slots == 0:
        assert found[2] == found[0] and found[0][1] == len(PROMPT) + 70


def test_answers_read_together_are_those_alone(model: Model):
    prompts = [PROMPT, PROMPT[5:], PROMPT[:20]]
    options = [WARM | {"seed": n, "max_tokens": 40} for n in range(3)]

    def made() -> list[Generation]:
        return [model.generate(p, **o) for p, o in zip(prompts, options, strict=True)]

    alone = made()
    wanted = [(a.text, a.tokens) for a in alone]
    both = made()
    for n, answer in enumerate(both):
        right = [*prompts[n], *wanted[n][1]]
        speculating(answer, None if n == 2 else Guessing(right, (1, 0.4)[n], n, long=True))
    for _ in model.together(both):
        pass
    assert [(a.text, a.tokens) for a in both] == wanted
    assert both[0].speculation is not None and both[0].speculation.accepted > 5


FILES = [f.__file__ for f in (drafted_file, speculation_file)]


def test_interrupts_leave_a_session_of_its_answer(model: Model):
    """Wherever Ctrl-C comes: a start of the tokens, and their bits."""
    plain = answered(model, **WARM, max_tokens=14)
    right = [*PROMPT, *plain[2]]
    rows = model.eval([*right[:-1], 3, 4], "all")[-2:].tobytes()
    free = model._engine.pools.pages.available, model._engine.pools.slots.available

    def answer(session: runtime.Session) -> None:
        made = model.generate(PROMPT, session=session, max_tokens=14, **WARM)
        text = speculating(made, Guessing(right, 0.8, 4)).text
        assert text

    with model.session() as session:
        lines = lines_of(lambda: answer(session), FILES)
    for line in range(1, lines, 1 + lines // 60):
        with model.session() as session:
            where = interrupted(lambda s=session: answer(s), FILES, line)  # type: ignore[misc]
            assert where
            tokens = session.tokens
            assert tokens == right[: len(tokens)]
            rest = right[len(tokens) : -1]
            assert session.eval([*rest, 3, 4], "all")[-2:].tobytes() == rows, where
    assert (model._engine.pools.pages.available, model._engine.pools.slots.available) == free


def test_rows_that_are_not_finite_are_nobodys(model: Model, monkeypatch: pytest.MonkeyPatch):
    """A draft may lead where the model's numbers do not go: then it is evaluated without."""
    plain = answered(model, **WARM, max_tokens=20)
    real = model._engine._execute

    def broken(program: Any, inputs: Any, live: Any) -> Sequence[np.ndarray]:
        logits, *rest = real(program, inputs, live)
        return [np.full_like(logits, np.nan) if 1 < live["outputs"] < 9 else logits, *rest]

    monkeypatch.setattr(model._engine, "_execute", broken)
    drafter = Guessing([*PROMPT, *plain[2]], 0.9)
    with model.session() as session:
        answer = model.generate(PROMPT, session=session, max_tokens=20, **WARM)
        assert speculating(answer, drafter).text and answer.tokens == plain[2]
