"""Answers that are read together: each as it would be alone, on devices that choose tokens too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from choosing_cpu import choosing, speaking
from small_models import NOVEL
from test_decoder import WARM, backend

from runtime.errors import MemoryLimitError, OptionError
from runtime.generation import Generation
from runtime.model import Model

PROMPTS = [list(range(40, 40 + n)) for n in (28, 31, 20)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speaking(tmp_path_factory.mktemp("together"), NOVEL["qwen35"])


@pytest.fixture(params=[True, False], ids=["device", "host"])
def model(request: pytest.FixtureRequest, path: Path) -> Iterator[Model]:
    with choosing(path, request.param, context=64) as made:
        yield made


def answers(model: Model, **options: object) -> list[Generation]:
    lengths = (12, 5, 9)
    return [
        model.generate(p, max_tokens=n, **WARM | {"seed": n} | options)
        for p, n in zip(PROMPTS, lengths, strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"repeat_penalty": 1.2}], ids=["plain", "penalty"])
def test_each_is_the_answer_it_would_be_alone(model: Model, options: dict[str, object]):
    alone = [(a.text, a.reason) for a in answers(model, **options)]
    free = model._engine.pools.pages.available
    both = answers(model, **options)
    texts = ["", "", ""]
    for n, text in model.together(both):
        texts[n] += text
    assert texts == [text for text, _ in alone] and [a.reason for a in both] == [
        r for _, r in alone
    ]
    assert model._engine.pools.pages.available == free
    if model._engine.decoder is not None and not options:
        log = backend(model).log[-2 * 11 :]  # the longest of them is chosen in so many steps
        assert sum(what == "wait" for what, _ in log) == 11 and log[1][0] == "begin"


def test_some_are_closed_and_sessions_go_on(model: Model):
    """A session that is left holding its answer is as if it had been alone."""
    with model.session() as session, model.session() as other:
        both = answers(model)
        both.append(model.generate(PROMPTS[0], session=session, max_tokens=7, **WARM))
        wanted = model.generate(PROMPTS[0], session=other, max_tokens=7, **WARM)
        assert wanted.text is not None
        for _ in model.together(both):
            if len(both[0].tokens) == 4:
                both[0].close()
        assert len(both[0].tokens) == 4 and both[0].reason is None
        assert both[3].tokens == wanted.tokens and session.tokens == other.tokens
        assert (session.eval([5]) == other.eval([5])).all()


def test_an_error_ends_one_answer(model: Model):
    alone = answers(model)[0].text
    with model.session() as session:
        both = [answers(model)[0], model.generate(PROMPTS[1], session=session, **WARM)]
        reading, text = model.together(both), ""
        while len(both[1].tokens) < 3:
            n, piece = next(reading)
            text += "" if n else piece
        session.rewind(1)
        with pytest.raises(OptionError, match="was used elsewhere meanwhile"):
            for n, piece in reading:
                text += "" if n else piece
        text += "".join(piece for n, piece in reading if not n)
    assert text == alone


def test_no_room_for_one(path: Path):
    found = []
    for choose in (True, False):
        with choosing(path, choose, context=64, sequences=3) as model:
            model._engine.pools.pages.count = 3
            both = answers(model)
            with pytest.raises(MemoryLimitError, match="pages"):
                list(model.together(both))
            list(model.together(both))
            found.append([a.tokens for a in both])
    assert found[0] == found[1]


def test_what_cannot_be_read_together(model: Model):
    one = answers(model)[0]
    with pytest.raises(OptionError, match="stands twice"):
        model.together([one, one])
    with pytest.raises(OptionError, match="only answers of the same model"):
        model.together([one, "text"])
    one._reading.acquire()
    with pytest.raises(OptionError, match="is being read already"):
        next(model.together([one]))
