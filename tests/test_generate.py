"""Generation: what is refused when it is asked for, why an answer ended, what a session keeps.

The null backend gives zero logits, so a logit bias says which token is chosen.
"""

from __future__ import annotations

import copy
import gc
import math
import pickle
import re
import threading
from collections.abc import Iterator

import pytest
from fake_model import DEMO, needs_demo
from small_models import write_model

import runtime
from runtime.errors import Error, MemoryLimitError, OptionError
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
        ({"max_tokens": -2}, "max_tokens=-2"),
        ({"max_tokens": 1.5}, "max_tokens=1.5"),
        ({"max_tokens": True}, "max_tokens=True"),
        ({"on_token": 3}, "on_token=3"),
        ({"on_prompt": 3}, "on_prompt=3"),
        ({"ignore_eos": 1}, "ignore_eos=1"),
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


@pytest.mark.parametrize("kind", ["generate", "chat"])
def test_an_unknown_keyword_is_named_as_python_names_it(model: Model, kind: str):
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        getattr(model, kind)("Once", temprature=1)


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
    free = model._engine.pools.pages.free
    answer = model.generate([1, 2], **chooses(5))
    next(answer)
    assert model._engine.pools.pages.free < free
    answer.close()
    assert model._engine.pools.pages.free == free


def test_an_answer_tells_its_text_tokens_and_log_probabilities(model: Model):
    letter = model.tokenizer.encode("a")[0]
    answer = model.generate([1], max_tokens=3, logprobs=2, **chooses(letter))
    assert answer.prompt_tokens == 1 and answer.tokens == [] and "0 tokens" in repr(answer)
    first = next(answer)
    assert first == "a" and answer.tokens == [letter] and answer.reason is None
    assert answer.text == "aaa" == answer.text, "the pieces read before are part of it"
    assert answer.tokens == [letter] * 3 and answer.reason == "length"
    assert [t.id for t in answer.logprobs] == answer.tokens
    even = -math.log(model.vocab_size)  # the bias is not the model's own
    assert [t.logprob for t in answer.logprobs] == pytest.approx([even] * 3)
    assert [len(t.top) for t in answer.logprobs] == [2] * 3
    assert not model.generate([1], max_tokens=1, **chooses(letter)).logprobs


def test_the_prompt_tells_how_far_it_is(model: Model):
    told: list = []
    options = {"max_tokens": 3, "on_prompt": lambda *at: told.append(at), **chooses(5)}
    answer = model.generate([9, 2, 3], **options)
    assert told == []
    assert len(answer.text) == 3 and told == [(0, 3), (3, 3)]
    assert len(model.generate([9, 2, 3], **options).text) == 3 and told[2:] == [(0, 1), (1, 1)]


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_answer_is_not_copied(model: Model, way):
    with model.generate("Once", max_tokens=2) as answer:
        with pytest.raises(OptionError, match="an answer under way holds a session"):
            way(answer)
        list(answer)
        assert answer.reason and answer.tokens


def test_a_tokenizer_can_be_copied_and_pickled(model: Model):
    """So that other processes can use it: text becomes tokens there without the model."""
    own, text = model.tokenizer, "A small dog,<|im_end|> and 1 cat."
    for other in (copy.copy(own), copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert other.encode(text) == own.encode(text)
        assert other.decode(own.encode(text)) == own.decode(own.encode(text))
        assert other.end_ids == own.end_ids


def test_one_message_may_be_a_text(model: Model):
    options = {"max_tokens": 2, **chooses(5)}
    listed = model.chat([{"role": "user", "content": "Hi"}], **options)
    assert model.chat("Hi", **options).prompt_tokens == listed.prompt_tokens


def test_a_chat_takes_tools_a_template_and_what_it_wants_to_know(model: Model):
    def weather(city: str) -> str:
        """The weather.

        Args:
            city: Where.
        """

    own = "{{ messages[0].content }}{{ tools[0].function.name if tools }}{{ more }}{{ tokenizer }}"
    said = {"template": own, "tools": [weather], "max_tokens": 0}
    tokens = len(model.tokenizer.encode("Hiweatherabcd"))
    options = {"more": "ab", "tokenizer": "cd"}
    assert model.chat("Hi", template_options=options, **said).prompt_tokens == tokens


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"template": "nmae"}, "template='nmae' is not in this file"),
        ({"template": 5}, "template=5"),
        ({"template": "{{ messages"}, "chat template is broken"),
        ({"template_options": 5}, "template_options=5 must be a mapping"),
        ({"template_options": {1: 2}}, "template_options={1: 2} must be"),
        ({"template_options": {"tools": []}}, "template_options cannot hold 'tools'"),
        ({"tools": 5}, "tools=5"),
        ({"room": -1}, "room=-1"),
        ({"room": None}, "room=None"),
    ],
    ids=str,
)
def test_options_of_a_chat_alone(model: Model, options: dict, says: str):
    with pytest.raises(Error, match=re.escape(says)):
        model.chat("Hi", **options)


@pytest.mark.parametrize("messages", [None, 5, b"Hi", {"role": "user"}, [], [None], [{}], ["Hi"]])
def test_what_are_no_messages(model: Model, messages):
    with pytest.raises(Error) as caught:
        model.chat(messages)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"samplers": "top_k", "top_p": 0.5}, "top_p=0.5 has no effect with samplers='top_k'"),
        ({"mirostat": 2, "top_k": 40}, "top_k=40 has no effect with mirostat=2"),
        ({"mirostat": 2, "samplers": "top_k"}, "samplers has no effect with mirostat=2"),
    ],
    ids=str,
)
def test_an_option_that_nobody_looks_at_is_refused(model: Model, options: dict, says: str):
    with pytest.raises(OptionError, match=re.escape(says)):
        model.generate("Once", **options)


def test_options_that_mean_off_may_be_left_out(model: Model):
    model.generate("Once", samplers="top_k", top_p=1.0, min_p=0).close()
    model.generate("Once", mirostat=2, top_k=0, temperature=0.5).close()


def test_what_ends_with_an_error_stays_ended(model: Model):
    def refuses(token):
        raise KeyError("mine")

    free = model._engine.pools.pages.free
    answer = model.generate([1], on_token=refuses, **chooses(5))
    with pytest.raises(KeyError, match="mine"):
        next(answer)
    assert list(answer) == [] and answer.reason is None and model._engine.pools.pages.free == free


def test_reading_from_two_threads_is_one_clear_line(model: Model):
    reading, go_on = threading.Event(), threading.Event()

    def waits(token):
        reading.set()
        go_on.wait(10)

    answer = model.generate([1], max_tokens=5, on_token=waits, **chooses(5))
    thread = threading.Thread(target=lambda: answer.text)
    thread.start()
    assert reading.wait(10)
    with pytest.raises(OptionError, match=r"read already, by another thread"):
        next(answer)
    answer.close()  # from any thread: the token under way is the last
    go_on.set()
    thread.join(10)
    assert len(answer.tokens) == 1 and answer.reason is None


def test_close_may_be_called_while_a_token_is_told(model: Model):
    free = model._engine.pools.pages.free
    answer = model.generate([1], on_token=lambda token: answer.close(), **chooses(5))
    assert len(list(answer)) == 1 and model._engine.pools.pages.free == free
    with model.generate([1], **chooses(5)) as answer:
        next(answer)
        assert model._engine.pools.pages.free < free
    assert model._engine.pools.pages.free == free and list(answer) == []


def test_an_answer_forgotten_half_way_gives_its_pages_back_at_once(model: Model):
    free = model._engine.pools.pages.free
    gc.disable()
    try:
        answer = model.generate([1], **chooses(5))
        next(answer)
        assert model._engine.pools.pages.free < free
        del answer
        assert model._engine.pools.pages.free == free
    finally:
        gc.enable()


def test_a_session_used_elsewhere_meanwhile_is_noticed(model: Model):
    with model.session() as session:
        first = model.generate([1, 2], session=session, **chooses(5))
        second = model.generate([3], session=session, **chooses(5))
        next(first)
        with pytest.raises(OptionError, match="has 2 tokens and had 0: it was used elsewhere"):
            next(second)
        session.eval([4])
        with pytest.raises(OptionError, match="used elsewhere"):
            next(first)


def test_what_may_have_become_a_stop_string_is_shown_in_the_end(model: Model):
    letter = model.tokenizer.encode("a")[0]
    answer = model.generate([1], max_tokens=3, stop="aaaa", **chooses(letter))
    assert answer.text == "aaa" and answer.reason == "length"


def test_a_stop_string_may_be_a_token_that_is_not_shown(model: Model):
    mark = model.tokenizer.encode("<|im_start|>")
    assert len(mark) == 1 and model.tokenizer.is_control(mark[0])
    answer = model.generate([1], max_tokens=3, stop="<|im_start|>", **chooses(mark[0]))
    assert answer.text == "" and answer.reason == "stop" and answer.tokens == mark


def test_sessions_that_cannot_be_continued(model: Model):
    with runtime.load(DEMO, devices="null", context=64, sequences=1) as other:
        wrong = {"made it": other.session(), "made by model.session": model.session().snapshot()}
        closed = model.session()
        closed.close()
        for says, session in {**wrong, "session is closed": closed}.items():
            for ask in (model.generate, model.chat):
                with pytest.raises(OptionError, match=says):
                    ask("Hi", session=session)
