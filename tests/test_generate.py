"""Generation: what is refused when it is asked for, why an answer ended, what a session keeps.

The null backend gives zero logits, so a logit bias says which token is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_model import DEMO, needs_demo
from small_models import write_model

import runtime
from runtime.errors import MemoryLimitError, OptionError
from runtime.model import Model

pytestmark = needs_demo


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with runtime.load(DEMO, devices="null", context=64, sequences=2) as loaded:
        yield loaded


def chooses(token: int) -> dict:
    """Options that make a model of equal logits choose one token."""
    return {"temperature": 0, "logit_bias": {token: 9.0}}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temprature": 1}, "unknown option 'temprature'; options are max_tokens"),
        ({"max_tokens": -2}, "max_tokens=-2"),
        ({"max_tokens": 1.5}, "max_tokens=1.5"),
        ({"max_tokens": True}, "max_tokens=True"),
        ({"on_token": 3}, "on_token=3"),
        ({"top_p": 2}, "top_p"),
        ({"logit_bias": {10**6: 1.0}}, "outside the vocabulary"),
        ({"stop": [""]}, "stop string"),
    ],
)
@pytest.mark.parametrize("kind", ["generate", "chat"])
def test_options_are_refused_when_called(model: Model, kind: str, options: dict, says: str):
    asked = "Once" if kind == "generate" else [{"role": "user", "content": "Hi"}]
    with pytest.raises(OptionError, match=says):
        getattr(model, kind)(asked, **options)


def test_prompts_are_refused_when_called(model: Model):
    with pytest.raises(MemoryLimitError, match="65 tokens do not fit in context=64"):
        model.generate([1] * 65)
    with pytest.raises(MemoryLimitError, match="do not fit"):
        model.chat([{"role": "user", "content": "fox " * 99}])
    with pytest.raises(OptionError, match="prompt is empty"):
        model.generate("")
    with pytest.raises(OptionError, match="outside the vocabulary"):
        model.generate([10**6])
    with pytest.raises(OptionError, match="list of whole numbers"):
        model.generate([1.5])


def test_a_file_without_a_vocabulary_says_so(tmp_path):
    with (
        runtime.load(write_model(tmp_path / "m.gguf"), devices="null") as bare,
        pytest.raises(OptionError, match="no vocabulary, so there is no text"),
    ):
        bare.generate([1, 2])


def test_a_refused_chat_leaves_its_session_alone(model: Model):
    with model.session() as session:
        session.eval(list(range(40)), "none")
        for message, room in (("fox " * 99, 0), ("Hi", 60)):
            with pytest.raises(MemoryLimitError):
                model.chat([{"role": "user", "content": message}], session=session, room=room)
        with pytest.raises(OptionError):
            model.chat([{"role": "user", "content": "Hi"}], session=session, top_p=2)
        assert session.tokens == list(range(40))


def test_a_chat_keeps_what_it_has_in_common(model: Model):
    messages = [{"role": "user", "content": "Hi"}]
    with model.session() as session:
        first = list(model.chat(messages, session=session, max_tokens=3, **chooses(5)))
        held = list(session.tokens)
        messages += [
            {"role": "assistant", "content": "".join(first)},
            {"role": "user", "content": "Bye"},
        ]
        answer = model.chat(messages, session=session, max_tokens=1)
        assert session.tokens == held, "nothing happens before the first piece"
        list(answer)
        assert session.tokens[: len(held)] == held and len(session) > len(held)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_tokens": 3}, "length"),
        ({"max_tokens": 0}, "length"),
        ({"max_tokens": 60}, "length"),
        ({"max_tokens": 61}, "length"),
        ({"max_tokens": 62}, "context"),
        ({"max_tokens": -1}, "context"),
        ({}, "context"),
    ],
)
def test_why_an_answer_ended(model: Model, options: dict, reason: str):
    tokens: list = []
    answer = model.generate([1, 2, 3, 4], on_token=tokens.append, **options, **chooses(5))
    assert answer.reason is None
    list(answer)
    assert answer.reason == reason
    most = options.get("max_tokens", -1)
    assert len(tokens) == (61 if most < 0 else min(most, 61))


def test_end_tokens_and_stop_strings_end_an_answer(model: Model):
    end = model.tokenizer.eos_id
    ended = model.generate([1], **chooses(end))
    assert list(ended) == [] and ended.reason == "end"
    letter = model.tokenizer.encode("a")[0]
    stopped = model.generate([1], stop="aaa", **chooses(letter))
    assert "".join(stopped) == "" and stopped.reason == "stop"


def test_ignore_eos_never_chooses_an_end_token(model: Model):
    end, tokens = model.tokenizer.eos_id, []
    options = {"ignore_eos": True, "max_tokens": 5, **chooses(end)}
    list(model.generate([1], on_token=lambda token: tokens.append(token.id), **options))
    assert len(tokens) == 5 and not set(tokens) & set(model.tokenizer.end_ids)


def test_an_answer_left_early_gives_its_pages_back(model: Model):
    free = model._pool.free
    answer = model.generate([1, 2], **chooses(5))
    next(answer)
    assert model._pool.free < free
    answer.close()
    assert model._pool.free == free
