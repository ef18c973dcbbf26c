"""Chat templates: what templates of model files may use, and what happens when they fail."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
from vocabularies import byte_pairs, scored

from runtime.errors import OptionError, TextError
from runtime.text.chat import ChatTemplate
from runtime.text.tokenizer import Tokenizer
from runtime.text.tools import function_schema

USER = [{"role": "user", "content": "Hi & <you>"}]


def test_chatml_is_the_default():
    template = ChatTemplate(None)
    messages = [{"role": "system", "content": "Be brief."}, *USER]
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi & <you><|im_end|>\n"
    assert template.is_default
    assert template.render(messages, add_generation_prompt=False) == expected
    assert template.render(messages) == expected + "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}\n  {% if true %}\nx\n  {% endif %}\n{% endfor %}\n", "x\n"),
        ("{{ messages[0].content | tojson }}", '"Hi & <you>"'),
        ("{{ {'b': 'é', 'a': [1]} | tojson(indent=1) }}", '{\n "b": "é",\n "a": [\n  1\n ]\n}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}said{% endgeneration %}!", "said!"),
        ("{{ bos_token }}|{{ eos_token }}|{{ unk_token }}", "<s>|</s>|"),
        ("{% if tools %}T{% endif %}{% if tools is none %}none{% endif %}", "none"),
        ("{{ enable_thinking is defined }}", "False"),
        ("{% set ns = namespace(n=0) %}{% set ns.n = 3 %}{{ ns.n }}", "3"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{{ 'a b'.split(' ')[1].strip().upper() }}", "B"),
    ],
)
def test_what_templates_may_use(source, expected):
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    assert template.render(USER) == expected


def test_strftime_now_and_extra_names():
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(USER) == str(datetime.now().year)
    assert ChatTemplate("{{ enable_thinking }}").render(USER, enable_thinking=False) == "False"
    tools = [{"name": "f"}]
    assert ChatTemplate("{{ tools[0] | tojson }}").render(USER, tools=tools) == '{"name": "f"}'


def test_a_template_for_tools_is_used_with_tools_only():
    template = ChatTemplate({"default": "plain", "tool_use": "{{ tools[0].name }}"})
    assert template.render(USER) == "plain"
    assert template.render(USER, tools=[{"name": "f"}]) == "f"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% for %}", "broken in line 1"),
        ("\n\n{{ x | nofilter }}", "broken in line 3"),
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "cannot take these messages"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "cannot take these messages"),
        ("{{ range(10**9) | list }}", "cannot take these messages"),
    ],
)
def test_templates_that_fail_say_so_in_one_line(source, says):
    with pytest.raises(TextError) as caught:
        ChatTemplate(source).render(USER)
    assert says in str(caught.value) and "\n" not in str(caught.value)


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
TEXT_CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}


def calls(call=CALL, **message) -> list[dict]:
    return [*USER, {"role": "assistant", "tool_calls": [call], **message}]


# What a template does with the content of a message that only calls tools.
LAST = "{% set m = messages[-1] %}"
NAMES = "{% for c in m.tool_calls %}<{{ c.function.name }}>{% endfor %}"
CONTENT = {
    "joins": (LAST + "{{ 'a' + m.content + 'b' }}" + NAMES, "ab<weather>"),
    "prints": (LAST + "{{ m.content }}" + NAMES, "<weather>"),
    "splits": (LAST + "{{ m['content'].split('x')[-1] }}" + NAMES, "<weather>"),
    "asks for none": (
        LAST
        + "{% if m['content'] is none %}"
        + NAMES
        + "{% else %}{{ m.content + '!' }}{% endif %}",
        "<weather>",
    ),
    "shows calls beside none only": (
        LAST + "{% if m.content is none %}" + NAMES + "{% endif %}.",
        "<weather>.",
    ),
    "asks whether it is there": (
        LAST + "{% if 'content' in m %}{{ m.content + '!' }}{% endif %}" + NAMES,
        "<weather>",
    ),
}


@pytest.mark.parametrize("message", [{"content": None}, {}], ids=["none", "missing"])
@pytest.mark.parametrize("kind", CONTENT)
def test_a_message_without_content(kind, message):
    source, expected = CONTENT[kind]
    assert ChatTemplate(source).render(calls(**message)) == expected


def test_keys_that_are_none_are_not_there():
    source = "{% for key in messages[0] %}{{ key }} {% endfor %}"
    message = {"role": "user", "content": "Hi", "name": None, "tool_calls": None}
    assert ChatTemplate(source).render([message]) == "role content "


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("asked", ["reasoning_content", "thinking"])
def test_reasoning_has_the_name_that_the_template_asks_for(name, asked):
    message = {"role": "assistant", "content": "4", name: "two and two"}
    template = ChatTemplate("{{ messages[1]." + asked + " }}")
    assert template.render([*USER, message]) == "two and two"


def test_the_first_name_of_reasoning_counts():
    message = {"role": "assistant", "content": "4", "reasoning": "c", "thinking": "b"}
    template = ChatTemplate("{{ messages[0].reasoning_content }}{{ messages[0].thinking }}")
    assert template.render([message]) == "bb"
    assert template.render([message | {"reasoning_content": "a"}]) == "ab"
    assert template.render([message | {"reasoning_content": None, "thinking": None}]) == "cc"


def test_reasoning_goes_by_its_own_name_where_a_template_refuses_it_by_another():
    """Hugging Face fills in `thinking`, which this template does not take beside content."""
    source = (
        "{% set m = messages[-1] %}{% if m.content and m.thinking %}"
        "{{ raise_exception('not both') }}{% endif %}{{ m.content }}"
    )
    message = {"role": "assistant", "content": "4", "reasoning_content": "two and two"}
    assert ChatTemplate(source).render([*USER, message]) == "4"


@pytest.mark.parametrize("call", [CALL, TEXT_CALL], ids=["mapping", "text"])
def test_arguments_are_what_the_template_wants(call):
    first = "{% set f = messages[-1].tool_calls[0].function %}"
    mapping = ChatTemplate(
        first + "{% for k, v in f.arguments.items() %}{{ k }}={{ v }}{% endfor %}"
    )
    assert mapping.render(calls(call, content="")) == "city=Bonn"
    text = ChatTemplate(first + "{{ '(' + f.arguments + ')' }}")
    assert text.render(calls(call, content="")) == '({"city": "Bonn"})'
    parsed = ChatTemplate(first + "{{ (f.arguments | from_json).city }}")
    assert parsed.render(calls(call, content="")) == "Bonn"


def test_arguments_that_are_no_object_stay_as_they_are():
    first = "{% set f = messages[-1].tool_calls[0].function %}"
    call = {"type": "function", "function": {"name": "f", "arguments": "not JSON"}}
    assert ChatTemplate(first + "{{ f.arguments }}").render(calls(call)) == "not JSON"
    with pytest.raises(TextError, match="cannot take these messages"):
        ChatTemplate(first + "{{ f.arguments.items() | list }}").render(calls(call))


def test_parts_of_text_are_joined_for_a_template_of_texts():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    message = [{"role": "user", "content": parts}]
    assert ChatTemplate("{{ messages[0].content + '.' }}").render(message) == "one\ntwo."
    knows = ChatTemplate("{% for p in messages[0].content %}<{{ p.text }}>{% endfor %}")
    assert knows.render(message) == "<one><two>"
    image = [{"role": "user", "content": [*parts, {"type": "image"}]}]
    with pytest.raises(
        TextError, match=r"these messages: .*; message 0 has a part of type 'image'"
    ):
        ChatTemplate("{{ messages[0].content + '.' }}").render(image)


def test_unset_special_tokens_are_empty():
    assert ChatTemplate("{{ bos_token + 'a' + pad_token }}").render(USER) == "a"


def test_a_template_sees_plain_values_only():
    @dataclass
    class Message:
        role: str
        content: str

    class Opaque:
        secret = "password"

    template = ChatTemplate("{{ messages | tojson }}{{ thing.secret is defined }}")
    given = [Message("user", "Hi"), {"role": "user", "content": np.str_("a"), "n": np.int64(3)}]
    assert template.render(given, thing=Opaque()) == (
        '[{"role": "user", "content": "Hi"}, {"role": "user", "content": "a", "n": 3}]False'
    )


def test_the_messages_stay_as_they_were():
    given = calls(TEXT_CALL, content=None, reasoning="r")
    before = copy.deepcopy(given)
    ChatTemplate("{{ messages[-1].tool_calls[0].function.arguments.items() | list }}").render(given)
    assert given == before


class TestTools:
    def test_functions_are_described(self):
        def weather(city: str, days: int = 1, unit: Literal["C", "F"] = "C") -> str:
            """The weather forecast.

            For one city.

            Args:
                city: Where,
                    by name.
                days: How many days ahead.
                unit: Of the temperature.

            Returns:
                A sentence.
            """
            return ""

        template = ChatTemplate("{{ tools[0] | tojson }}")
        assert json.loads(template.render(USER, tools=[weather])) == {
            "type": "function",
            "function": {
                "name": "weather",
                "description": "The weather forecast.\n\nFor one city.",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "city": {"type": "string", "description": "Where, by name."},
                        "days": {"type": "integer", "description": "How many days ahead."},
                        "unit": {
                            "type": "string",
                            "enum": ["C", "F"],
                            "description": "Of the temperature.",
                        },
                    },
                    "required": ["city"],
                },
                "return": {"type": "string", "description": "A sentence."},
            },
        }

    @pytest.mark.parametrize(
        ("hint", "schema"),
        [
            (float, {"type": "number"}),
            (list[int], {"type": "array", "items": {"type": "integer"}}),
            (dict[str, bool], {"type": "object", "additionalProperties": {"type": "boolean"}}),
            (tuple[int, str], {
                "type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]
            }),
            (int | None, {"type": "integer", "nullable": True}),
            (int | str, {"type": ["integer", "string"]}),
            (list[int] | str, {"anyOf": [
                {"type": "array", "items": {"type": "integer"}}, {"type": "string"}
            ]}),
            (Literal[1, "a"], {"type": ["integer", "string"], "enum": [1, "a"]}),
            (Enum("Colour", {"RED": "red"}), {"type": "string", "enum": ["red"]}),
            (Any, {}),
        ],
    )  # fmt: skip
    def test_type_hints(self, hint, schema):
        def f(x):
            """F.

            Args:
                x: X.
            """

        f.__annotations__ = {"x": hint}
        found = function_schema(f)["function"]["parameters"]["properties"]["x"]
        assert found == schema | {"description": "X."}

    def test_what_cannot_be_described_is_refused_in_one_line(self):
        def bare(x: int):
            pass

        def unhinted(x):
            """Does.

            Args:
                x: X.
            """

        def undescribed(x: int):
            """Does."""

        def odd(x: object()):
            """Does.

            Args:
                x: X.
            """

        template = ChatTemplate("{{ tools }}")
        for tools, says in (
            ([bare], "bare has no docstring"),
            ([unhinted], "type hint for its argument x"),
            ([undescribed], "under 'Args:'"),
            ([odd], "odd"),
            ([7], "neither a function"),
            ("weather", "must be a list"),
            (7, "must be a list"),
        ):
            with pytest.raises(OptionError, match=says) as caught:
                template.render(USER, tools=tools)
            assert "\n" not in str(caught.value)

    def test_a_template_without_a_place_for_tools_refuses_them(self):
        with pytest.raises(OptionError, match="no place for tools"):
            ChatTemplate("{{ messages[0].content }}").render(USER, tools=[CALL])
        assert ChatTemplate("{{ tools is none }}").render(USER, tools=[]) == "True"


class TestNamedTemplates:
    SEVERAL: ClassVar = {"default": "d", "tool_use": "{{ tools and 't' }}", "rag": "r"}

    @pytest.mark.parametrize(
        ("sources", "options", "text"),
        [
            (SEVERAL, {}, "d"),
            (SEVERAL, {"tools": [CALL]}, "t"),
            (SEVERAL, {"template": "rag"}, "r"),
            ({"only": "o"}, {}, "o"),
            ({"tool_use": "{{ tools and 't' }}"}, {"tools": [CALL]}, "t"),
        ],
    )
    def test_which_one_is_used(self, sources, options, text):
        assert ChatTemplate(sources).render(USER, **options) == text

    @pytest.mark.parametrize(
        ("sources", "options", "says"),
        [
            (SEVERAL, {"template": "rga"}, "'rga' is not in this file.*default, rag, tool_use"),
            ({"a": "1", "b": "2"}, {}, "several .* none is the default: choose one of a, b by"),
            (SEVERAL, {"template": 3}, "template=3"),
        ],
    )
    def test_a_name_that_is_not_there_lists_those_that_are(self, sources, options, says):
        with pytest.raises(OptionError, match=says):
            ChatTemplate(sources).render(USER, **options)

    def test_a_file_with_named_ones_only(self):
        metadata = byte_pairs(
            **{
                "tokenizer.chat_templates": ["rag"],
                "tokenizer.chat_template.rag": "{{ messages[0].content }}",
            }
        )
        assert Tokenizer(metadata).apply_chat_template(USER, tokenize=False) == "Hi & <you>"


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (["text"], "message 0"),
        ([{"content": "no role"}], "message 0"),
        ([None], "message 0"),
        ([], "no messages"),
        (None, "must be a list"),
        ("Hi", "must be a list"),
        ({"role": "user"}, "must be a list"),
        (5, "must be a list"),
    ],
)
def test_messages_have_roles(messages, says):
    with pytest.raises((TextError, OptionError), match=says):
        ChatTemplate(None).render(messages)


def test_templates_come_from_the_file():
    metadata = byte_pairs(
        **{
            "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
            "tokenizer.chat_template.tool_use": "{{ tools | length }} tools",
        }
    )
    template = ChatTemplate.of(Tokenizer(metadata), metadata)
    assert not template.is_default
    assert template.render(USER) == "<|bos|>Hi & <you><|im_end|>"
    assert template.render(USER, tools=[{}]) == "1 tools"
    with pytest.raises(TextError, match=r"tokenizer\.chat_template is int"):
        ChatTemplate.of(Tokenizer(metadata), {"tokenizer.chat_template": 3})


@pytest.mark.parametrize("source", ["{{ bos_token }}a", "a"])
def test_encode_puts_exactly_one_bos_where_the_model_wants_it(source):
    tokenizer = Tokenizer(scored({"▁": -1.0, "a": -2.0, "▁a": -0.5}))
    template = ChatTemplate.of(tokenizer, {"tokenizer.chat_template": source})
    ids = template.encode(tokenizer, USER)
    assert [tokenizer.token_text(i) for i in ids] == ["<s>", "▁a"]


def test_encode_reads_the_marks_of_the_template():
    metadata = byte_pairs()
    tokenizer = Tokenizer(metadata)
    ids = ChatTemplate.of(tokenizer, metadata).encode(tokenizer, [{"role": "he", "content": "ll"}])
    assert [tokenizer.token_text(i) for i in ids[:5]] == [
        "<|im_start|>",
        "he",
        "Ċ",
        "ll",
        "<|im_end|>",
    ]


def test_a_model_without_text_still_has_a_template():
    metadata = {"tokenizer.ggml.model": "none", "tokenizer.ggml.padding_token_id": 0}
    assert ChatTemplate.of(Tokenizer(metadata), metadata).is_default


def test_apply_chat_template_is_render_or_encode():
    metadata = byte_pairs()
    tokenizer = Tokenizer(metadata)
    text = tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=False)
    assert text == "<|im_start|>user\nHi & <you><|im_end|>\n"
    assert tokenizer.apply_chat_template(USER) == tokenizer.chat_template.encode(tokenizer, USER)


FOLDER = Path(os.environ.get("CHAT_TEMPLATES", "."))


@pytest.mark.skipif("CHAT_TEMPLATES" not in os.environ, reason="CHAT_TEMPLATES names no folder")
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.jinja")), ids=lambda p: p.stem)
def test_a_folder_of_templates(path):
    """Every template renders a chat; tools and calls render or are refused in one line."""
    template = ChatTemplate(path.read_text("utf-8"), {"bos_token": "<s>", "eos_token": "</s>"})
    for messages in (USER, calls(content=None), calls(TEXT_CALL, reasoning="r")):
        for tools in (None, [{"type": "function", "function": {"name": "weather"}}]):
            try:
                text = template.render(messages, tools=tools)
            except (TextError, OptionError) as error:
                assert "\n" not in str(error)
                continue
            assert "Hi & <you>" in text and "None" not in text
            assert tools is None or "weather" in text


@pytest.mark.parametrize("message", [{"role": "user"}, {"role": "system", "content": None}])
def test_a_message_without_content_is_not_answered(message):
    with pytest.raises(TextError, match=r"message 1, of role '\w+', has no 'content'"):
        ChatTemplate(None).render([*USER, message])
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert ChatTemplate(None).render([*USER, call])
