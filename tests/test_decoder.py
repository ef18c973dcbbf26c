"""Steps begun before their token is known: the same tokens, and nobody can tell that they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from choosing_cpu import ChoosingCpu, choosing, speaking
from small_models import NOVEL, Sizes

from runtime.errors import BackendError, MemoryLimitError, OptionError
from runtime.model import Model
from runtime.session import Session

SIZES = {"qwen3": Sizes(layers=1), "qwen35": NOVEL["qwen35"]}
WARM = {"temperature": 4.0, "top_k": 40, "top_p": 1.0, "min_p": 0.0, "seed": 3}
PROMPT = list(range(40, 68))  # the answer reaches into the second page


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    paths = {name: speaking(tmp_path_factory.mktemp(name), size) for name, size in SIZES.items()}
    return paths.__getitem__


@pytest.fixture(params=SIZES)
def path(request: pytest.FixtureRequest, file: Callable[[str], Path]) -> Path:
    return file(request.param)


@pytest.fixture
def pair(path: Path) -> Iterator[tuple[Model, Model]]:
    """One whose device chooses tokens, and one where the host does."""
    with choosing(path, context=64) as ahead, choosing(path, False, context=64) as plain:
        yield ahead, plain


def backend(model: Model) -> ChoosingCpu:
    assert isinstance(model.backend, ChoosingCpu)
    return model.backend


def seen(session: Session) -> dict[str, Any]:
    """Everything that can be told of a session and of its model's memory."""
    record, pools = session._sequence.record, session.model._engine.pools
    state = record.state
    return {
        "tokens": session.tokens, "length": record.length, "pages": record.pages.held.tolist(),
        "free": pools.pages.free, "evaluated": record.evaluated,
        "kept": state and [(c.place, c.message_end) for c in state.checkpoints],
        "slots": state and len(state.held), "free slots": state and pools.slots.free,
    }  # fmt: skip


def same(ahead: Session, plain: Session) -> None:
    """The same, now and with another token."""
    assert seen(ahead) == seen(plain)
    assert (ahead.eval([5]) == plain.eval([5])).all()
    assert seen(ahead) == seen(plain)


@pytest.mark.parametrize("options", [{"temperature": 0}, WARM, WARM | {"top_p": 0.5, "seed": 8}])
def test_the_same_tokens(pair: tuple[Model, Model], options: dict[str, Any]):
    found = [model.generate(PROMPT, max_tokens=20, **options) for model in pair]
    assert found[0].text == found[1].text and found[0].tokens == found[1].tokens
    log = backend(pair[0]).log
    assert len(log) == 2 * 19, "the first token is chosen of the prompt's logits"
    waits = [log.index(("wait", n)) for n in range(19)]
    assert all(log.index(("begin", n + 1)) < waits[n] for n in range(18))


@pytest.mark.parametrize("options", [
    {"max_tokens": 1}, {"max_tokens": 2}, {"max_tokens": 6}, {"max_tokens": 7, "stop": "y"},
    {"max_tokens": -1},
])  # fmt: skip
def test_a_session_is_as_if_no_step_was_ahead(pair: tuple[Model, Model], options: dict[str, Any]):
    sessions = [model.session() for model in pair]
    answers = [
        session.model.generate(PROMPT, session=session, **WARM | options) for session in sessions
    ]
    assert answers[0].text == answers[1].text and answers[0].reason == answers[1].reason
    if options["max_tokens"] < 0:
        assert answers[0].reason == "context"
        return
    same(*sessions)


def test_an_end_token_comes_one_step_late(pair: tuple[Model, Model]):
    sessions = [model.session() for model in pair]
    free = pair[1].generate(PROMPT, max_tokens=12, **WARM)
    assert free.text
    plain = free.tokens
    pair[1]._engine.prompts.clear()
    last = next(i for i in range(4, 12) if plain[i] not in plain[:i])
    for model, session in zip(pair, sessions, strict=True):
        model.tokenizer.end_ids = frozenset({plain[last]})
        answer = model.generate(PROMPT, session=session, max_tokens=12, **WARM)
        assert answer.text == free.text[: len(answer.text)] and answer.reason == "end"
        assert answer.tokens == plain[: last + 1]
    assert backend(pair[0]).log[-2][0] == "begin", "a step was ahead"
    same(*sessions)


def test_an_answer_closed_early(pair: tuple[Model, Model]):
    sessions = [model.session() for model in pair]
    for model, session in zip(pair, sessions, strict=True):
        with model.generate(PROMPT, session=session, **WARM) as answer:
            while len(answer.tokens) < 5:
                next(answer)
    same(*sessions)


def test_others_use_the_model_meanwhile(pair: tuple[Model, Model]):
    """A fork, a snapshot and another answer between any two tokens; each as on the host."""
    found = []
    for model in pair:
        with model.session() as session, model.session() as other:
            first = model.generate(PROMPT, session=session, max_tokens=14, **WARM)
            second = model.generate(PROMPT[::-1], session=other, max_tokens=14, **WARM)
            told = []
            for n, _ in enumerate(zip(first, second, strict=False)):
                told.append([seen(session), seen(other)])
                if n == 2:
                    with session.fork() as fork:
                        told.append(fork.eval([7]).tolist())
                if n == 4:
                    session.snapshot().close()
            found.append((first.tokens, second.tokens, told))
    assert found[0] == found[1]


def test_a_session_changed_meanwhile_is_refused(pair: tuple[Model, Model]):
    sessions = [model.session() for model in pair]
    for model, session in zip(pair, sessions, strict=True):
        answer = model.generate(PROMPT, session=session, **WARM)
        while len(answer.tokens) < 4:
            next(answer)
        session.rewind(1)
        with pytest.raises(OptionError, match="was used elsewhere meanwhile"):
            list(answer)
    same(*sessions)


def test_logits_that_are_not_finite(pair: tuple[Model, Model]):
    ahead, plain = pair
    backend(ahead).broken = {3}
    session, other = ahead.session(), plain.session()
    answer = ahead.generate(PROMPT, session=session, max_tokens=9, **WARM)
    with pytest.raises(BackendError, match="logits are not finite"):
        list(answer)
    expected = plain.generate(PROMPT, session=other, max_tokens=4, **WARM)
    assert expected.text and answer.tokens == expected.tokens
    assert session.tokens == other.tokens
    assert (session.eval([5]) == other.eval([5])).all()


@pytest.mark.parametrize("count", [4, 5])
def test_an_interrupt_leaves_the_session_as_it_was(pair: tuple[Model, Model], count: int):
    """Of the step before the one that begins a page, and of that one."""
    ahead, plain = pair
    session, other = ahead.session(), plain.session()
    answer = ahead.generate(PROMPT, session=session, max_tokens=9, **WARM)
    while len(answer.tokens) < count:
        next(answer)

    class Log(list):
        def append(self, entry):
            if entry[0] == "wait":
                raise KeyboardInterrupt
            super().append(entry)

    backend(ahead).log = Log(backend(ahead).log)
    with pytest.raises(KeyboardInterrupt):
        list(answer)
    assert session.tokens == [*PROMPT, *answer.tokens[:-1]]
    backend(ahead).log = []
    other.eval(session.tokens)
    assert session._sequence.record.pages.used == other._sequence.record.pages.used
    assert (session.eval([5]) == other.eval([5])).all()
    assert session.model._engine.pools.pages.free == other.model._engine.pools.pages.free


def test_no_memory_for_a_step_ahead(file: Callable[[str], Path]):
    """The answer goes on without, and ends where the host's does."""
    found = []
    for choose in (True, False):
        with choosing(file("qwen3"), choose, context=64, sequences=1) as model:
            model._engine.pools.pages.count = 1
            answer = model.generate(PROMPT, max_tokens=50, **WARM)
            with pytest.raises(MemoryLimitError, match="pages") as error:
                list(answer)
            found.append((answer.tokens, str(error.value)))
            if choose:
                assert backend(model).log[-1] == ("wait", 3), "step 4 would need a page"
                assert ("begin", 4) not in backend(model).log
    assert found[0] == found[1]


@pytest.mark.parametrize("options", [
    {"logprobs": 1}, {"repeat_penalty": 1.2}, {"logit_bias": {5: 1.0}}, {"top_k": 65},
    {"top_k": 0}, {"mirostat": 2}, {"xtc_probability": 0.5}, {"typical_p": 0.9},
    {"samplers": "top_p;top_k;temperature"}, {"dynatemp_range": 0.5}, {"top_n_sigma": 1.0},
])  # fmt: skip
def test_what_devices_do_not_choose_by(file: Callable[[str], Path], options: dict[str, Any]):
    with choosing(file("qwen3"), context=64) as model:
        given = {"temperature": 0.9, "seed": 1} | options
        assert len(list(model.generate([1, 2], max_tokens=4, **given))) and not backend(model).log


def test_looking_into_steps_begins_none_ahead(file: Callable[[str], Path], monkeypatch):
    monkeypatch.setenv("VALIDATE", "1")
    with choosing(file("qwen3"), context=64) as model:
        assert list(model.generate([1, 2], max_tokens=3, temperature=0))
        assert not backend(model).log
