"""Models whose answers are held to a grammar, or that have to call a tool."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from choosing_cpu import choosing, speaking
from small_models import NOVEL, Sizes, write_model
from test_calls import function
from test_grammars import COLOURS
from vocabularies import byte_pairs

import runtime
from runtime.errors import OptionError
from runtime.model import Model


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speaking(tmp_path_factory.mktemp("grammars"), Sizes())


@pytest.fixture(params=[True, False], ids=["device", "host"])
def model(request: pytest.FixtureRequest, path: Path) -> Iterator[Model]:
    with choosing(path, request.param, context=128) as loaded:
        yield loaded


def test_a_model_that_chooses_on_its_device_is_held_to_grammars(model: Model):
    for options in ({"temperature": 0}, {"seed": 3}):
        found = model.generate([40, 41], regex="(hello|world ){2}[0-9]", max_tokens=99, **options)
        assert re.fullmatch("(hello|world ){2}[0-9]", found.text) and found.reason == "end"
    free = model.generate([40, 41], temperature=0, max_tokens=9).tokens
    model.generate([40, 41], temperature=0, max_tokens=9, regex="a{9}").text  # noqa: B018
    assert model.generate([40, 41], temperature=0, max_tokens=9).tokens == free


def test_beside_others_it_is_what_it_is_alone(model: Model):
    asked: list[dict[str, Any]] = [{"json_schema": COLOURS}, {}, {"regex": "[a-z ]{9}"}]
    options = {"seed": 4, "max_tokens": 24, "temperature": 1.5}
    alone = [model.generate([50, 51, 52], **options, **one).text for one in asked]
    both = [model.generate([50, 51, 52], **options, **one) for one in asked]
    for _ in model.together(both):
        pass
    assert [one.text for one in both] == alone
    requests = [model.submit([50, 51, 52], **options, **one) for one in asked]
    assert [one.result() for one in requests] == alone


def test_a_grammar_that_cannot_go_on_ends_its_answer_and_no_other(model: Model):
    forbidden = dict.fromkeys(range(100), -math.inf)
    options: dict[str, Any] = {"seed": 4, "max_tokens": 9}
    alone = model.generate([50, 51, 52], **options).text
    stuck = model.submit([50, 51], regex="a{5}", logit_bias=forbidden, **options)
    other = model.submit([50, 51, 52], **options)
    with pytest.raises(OptionError, match="logit_bias forbids every token"):
        stuck.result()
    assert other.result() == alone


@pytest.mark.parametrize("kind", [Sizes(), NOVEL["qwen35"]], ids=["attention", "hybrid"])
def test_what_is_forced_is_drafted_and_changes_no_bit(tmp_path: Path, kind: Sizes):
    text = "hello world, hello"
    options = {"json_schema": {"enum": [f"{text} a", f"{text} b"]}, "seed": 2, "logprobs": 2}
    with runtime.load(speaking(tmp_path, kind), context=128) as model:
        with model.session() as plain, model.session() as drafted:
            one = model.generate([40, 41], session=plain, spec="off", **options)
            two = model.generate([40, 41], session=drafted, **options)
            assert one.text == two.text and one.logprobs == two.logprobs
            assert plain.tokens == drafted.tokens
        assert two.speculation is None or set(two.speculation.kinds) <= {"grammar", "ngram"}


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    keys = byte_pairs()
    keys["tokenizer.chat_template"] = (
        '{% for t in tools or [] %}{{ t.function.name }}: <tool_call>{"name": 0, "arguments": 1}'
        "{% endfor %}{{ messages[0].content }}"
    )
    size = Sizes(vocabulary=len(keys["tokenizer.ggml.tokens"]))
    path = write_model(tmp_path_factory.mktemp("calls") / "m.gguf", size, extra=keys)
    with runtime.load(path, context=512) as loaded:
        yield loaded


def test_a_model_calls_the_tool_that_it_has_to(calling: Model):
    tools = [function("two")]
    tools[0]["function"]["parameters"] = {
        "type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"],
        "additionalProperties": False,
    }  # fmt: skip
    answer = calling.chat("hi", tools=tools, tool_choice="two", temperature=0, max_tokens=300)
    reader, deltas = answer.reader(), []
    for piece in answer:
        deltas += reader.feed(piece)
    deltas += reader.close()
    message = answer.message
    assert answer.reason == "end" and message["content"] is None
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == "two"
    assert json.loads(call["function"]["arguments"]) in ({"n": 1}, {"n": 2})
    assert [c.name for c in reader.calls] == ["two"]
    request = calling.submit(messages="hi", tools=tools, tool_choice="two", max_tokens=300)
    request.result()
    assert [c["function"]["name"] for c in request.message["tool_calls"]] == ["two"]
    assert request.reader().calls == []
    calling.chat([{"role": "user", "content": "hi"}, message], max_tokens=1).close()
    plain = calling.chat("hi", temperature=0, max_tokens=4)
    assert plain.message == {"role": "assistant", "content": plain.text}
    assert calling.generate("hi", max_tokens=0).message == {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tool_choice": "required"}, "tool_choice='required' needs tools"),
        ({"tools": [function("a")], "tool_choice": "b"}, "is none of the tools, which are a"),
        ({"tools": [function("a")], "tool_choice": 3}, "tool_choice=3 must be 'auto', 'none',"),
        ({"tools": [function("a")], "tool_choice": "a", "regex": "x"}, "cannot go together"),
        ({"tools": [function("a")], "tool_choice": "a", "template": "{{ tools }}"},
         "tool_choice cannot be enforced"),
        ({"tools": [{"function": {"name": "a", "parameters": {"properties": {"b": {"not": {}}}}}}],
          "tool_choice": "a"}, "tool_choice cannot be met or enforced"),
        ({"json_schema": {"not": {}}}, "json_schema uses not"),
    ],
)  # fmt: skip
def test_what_cannot_be_called_is_refused(calling: Model, options, says: str):
    with pytest.raises(OptionError, match=says) as caught:
        calling.chat("hi", **options)
    assert "\n" not in str(caught.value)
