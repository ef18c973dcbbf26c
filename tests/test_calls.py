"""Calls of tools in answers: read piece by piece, in every form, and required by a grammar."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest
from vocabularies import byte_pairs

from runtime.text.answer import Answer
from runtime.text.calls.enforced import enforced
from runtime.text.calls.forms import Form, form_of
from runtime.text.calls.json_text import JsonText
from runtime.text.calls.parameters import written
from runtime.text.calls.wanted import chosen_tools
from runtime.text.grammar.asked import asked_grammar
from runtime.text.sampling import Sampling
from runtime.text.tokenizer import Tokenizer

GET = {
    "type": "object", "required": ["city", "n"], "additionalProperties": False,
    "properties": {
        "city": {"type": "string", "maxLength": 9}, "n": {"type": "integer", "maximum": 99},
        "how": {"enum": ["c", "f"]},
    },
}  # fmt: skip
NONE = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = {"get": GET, "two": NONE, "python": {}}
JSON, XML, BARE, HARMONY = (
    Form(k, k in ("json", "xml")) for k in ("json", "xml", "bare", "harmony")
)

# form, end of the prompt, answer -> content, reasoning, calls as they are streamed
READ: list[tuple[Form, str, str, str, str, list[tuple[str, str]]]] = [
    (JSON, "", "plain  text < 3 <tool \n", "plain  text < 3 <tool \n", "", []),
    (JSON, "", '<think>\nhm <tool_call> no\n</think>\n\nHello\n <tool_call>\n{"name": "get", '
     '"arguments": {"city": "Par\\"is", "n": [1, {"a": 2}]}}\n</tool_call>\n<tool_call>\n'
     '{"name": "two", "arguments": {}}\n</tool_call>', "Hello", "hm <tool_call> no",
     [("get", '{"city": "Par\\"is", "n": [1, {"a": 2}]}'), ("two", "{}")]),
    (JSON, "", '<tool_call>{"arguments": {"city":"x"}, "name":"get"}</tool_call> and', "and", "",
     [("get", '{"city":"x"}')]),
    (JSON, "", '<tool_call>{"name":"get","arguments":"{\\"n\\": 1}"}</tool_call>', "", "",
     [("get", '{"n": 1}')]),
    (JSON, "", '<tool_call>{"name":"get","arguments":null}', "", "", [("get", "{}")]),
    (JSON, "", '<tool_call>{"name":"get"}</tool_call>', "", "", [("get", "{}")]),
    (JSON, "", '<tool_call>{"name": "\\u00e9", "arguments": {}}', "", "", [("é", "{}")]),
    (JSON, "<think>\n", "thinking hard</think>\n\nfine", "fine", "thinking hard", []),
    (JSON, "<think>\n", "never ends ", "", "never ends", []),
    (JSON, "", "I say <think> is a tag</think>", "I say <think> is a tag</think>", "", []),
    (JSON, "", "<tool_call>\n<function=two>\n</function>\n</tool_call>", "", "", [("two", "{}")]),
    (XML, "", "<think>\n\n</think>\n\n<tool_call>\n<function=get>\n<parameter=city>\nPar\"is\n\nx\n"
     "</parameter>\n<parameter=n>\n5\n</parameter>\n<parameter=b>\nTrue\n</parameter>\n</function>\n"
     "</tool_call>\n", "", "", [("get", '{"city": "Par\\"is\\n\\nx", "n": 5, "b": true}')]),
    (XML, "", "ok <function=two>\n</function>", "ok", "", [("two", "{}")]),
    (XML, "", '<tool_call>{"name": "two", "arguments": {}}</tool_call>', "", "", [("two", "{}")]),
    (BARE, "", '{"name": "get", "parameters": {"city": "x"}}; {"name": "two", "parameters": {}}',
     "", "", [("get", '{"city": "x"}'), ("two", "{}")]),
    (BARE, "", '{"type": "function", "name": "two", "parameters": {}}', "", "", [("two", "{}")]),
    (BARE, "", '<|python_tag|>{"name": "get", "parameters": {"n": 1}}', "", "",
     [("get", '{"n": 1}')]),
    (BARE, "", '<|python_tag|>two.call(query="a", n=3)', "", "",
     [("two", '{"query": "a", "n": 3}')]),
    (BARE, "", "<|python_tag|>print(1)\n", "", "", [("python", '{"code": "print(1)\\n"}')]),
    (BARE, "", 'text {"name": "get"}', 'text {"name": "get"}', "", []),
    (HARMONY, "", "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant<|channel|>"
     'commentary to=functions.get <|constrain|>json<|message|>{"city": "x"}<|call|>', "",
     "Let me see.", [("get", '{"city": "x"}')]),
    (HARMONY, "", ' to=functions.two<|channel|>commentary json<|message|>{}', "", "",
     [("two", "{}")]),
    (HARMONY, "", "<|channel|>analysis<|message|>A<|end|><|start|>assistant<|channel|>final"
     "<|message|>Hello <b> <|return|>", "Hello <b> ", "A", []),
    (HARMONY, "", "<|channel|>commentary<|message|>I will.<|end|><|start|>assistant<|channel|>"
     "analysis<|message|>B<|end|><|start|>assistant<|channel|>final<|message|>done",
     "I will.\n\ndone", "B", []),
    (HARMONY, "", "Hello there, this is plain", "Hello there, this is plain", "", []),
    (Form(), "", '<tool_call>{"name": "get"}', '<tool_call>{"name": "get"}', "", []),
]  # fmt: skip

# form, answer that holds no call, what is streamed of one that was not
BROKEN: list[tuple[Form, str, list[tuple[str, str]]]] = [
    (JSON, '<tool_call>{"name": "get", "arguments": nope}</tool_call> x', []),
    (JSON, 'a\n<tool_call>\n{"name": "get", "arguments": {"city": "x", -}}\n</tool_call> z',
     [("get", '{"city": "x", ')]),
    (JSON, '<tool_call>{"name": 3, "arguments": {}}</tool_call>', []),
    (JSON, '<tool_call>{"name": "get", "arguments": [1]}</tool_call>', []),
    (JSON, '<tool_call>{"arguments": {}}</tool_call>', []),
    (JSON, '<tool_call>{"name": "get", "arguments": {"a":', [("get", '{"a":')]),
    (JSON, "<tool_call>\n", []), (JSON, "<tool_call>hello</tool_call>", []),
    (XML, "<tool_call>\n<function=get>\n<parameter=city>\nabc", [("get", '{"city": "abc')]),
    (XML, "<tool_call>\n<function=get>\n<parameter=n", [("get", "")]),
    (XML, "<tool_call>\n<function=g t>\n", []), (XML, "<tool_call>\n<function=", []),
    (XML, "<tool_call>\n<function=get>\nbad</function></tool_call>", [("get", "")]),
    (BARE, '{"name": "nope", "parameters": {}}', []), (BARE, ' {"answer": 5}', []),
    (BARE, '{"name": "get", "parameters": 5}', []), (BARE, "{", []),
    (HARMONY, "<|channel|>ana", []), (HARMONY, "Hello<|message|>x", []),
    (HARMONY, "<|start|><|start|><|start|>", []),
    (HARMONY, '<|channel|>commentary to=functions.get<|message|>{"a": -oops}',
     [("get", '{"a": -oops')]),
]  # fmt: skip


def read(form: Form, prompt: str, pieces: list[str]) -> tuple[Any, ...]:
    """Content, reasoning, calls, and the message without ids."""
    reader = form.reader(prompt, TOOLS, lambda: "id")
    deltas = [delta for piece in pieces for delta in reader.feed(piece)] + reader.close()
    parts = [delta.call for delta in deltas if delta.call is not None]
    assert [bool(p.name) for p in parts] == [bool(p.id) for p in parts]
    calls: list[list[str]] = []
    for part in parts:
        if part.name:
            calls.append([part.name, ""])
        calls[-1][1] += part.arguments
        assert part.index in (len(calls) - 1, len(reader.calls))
    content = "".join(delta.content for delta in deltas)
    reasoning = "".join(delta.reasoning for delta in deltas)
    return content, reasoning, [tuple(call) for call in calls], reader.message


def pieces(text: str) -> list[list[str]]:
    """The text whole, cut at every place, and in pieces of some sizes."""
    cuts = [[text[:at], text[at:]] for at in range(len(text) + 1)]
    sizes = [[text[at : at + n] for at in range(0, len(text), n)] for n in (1, 2, 3, 5, 7)]
    return [[text], *cuts, *sizes]


@pytest.mark.parametrize(("form", "prompt", "text", "content", "reasoning", "calls"), READ)
def test_answers_are_read_however_they_are_cut(form, prompt, text, content, reasoning, calls):
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        made = [{"name": name, "arguments": arguments} for name, arguments in calls]
        message["tool_calls"] = [{"id": "id", "type": "function", "function": f} for f in made]
        message["content"] = content or None
    for some in pieces(text):
        assert read(form, prompt, some) == (content, reasoning, calls, message), some


@pytest.mark.parametrize(("form", "text", "calls"), BROKEN)
def test_what_is_no_call_is_content(form: Form, text: str, calls: list[tuple[str, str]]):
    for some in pieces(text):
        content, _, streamed, message = read(form, "", some)
        assert message == {"role": "assistant", "content": text} and streamed == calls, some
        assert calls or content == text


def test_without_tools_nothing_is_a_call():
    for form, _, text, *_ in READ:
        if form.kind in ("json", "xml", "bare") and "think" not in text:
            reader = form.reader()
            reader.feed(text)
            reader.close()
            assert reader.message == {"role": "assistant", "content": text}


def test_json_ends_where_it_ends_and_what_is_none_is_found():
    chance = random.Random(0)

    def value(depth: int = 0) -> Any:
        kind = chance.randrange(6 if depth < 4 else 4)
        if kind < 2:
            return chance.choice([True, None, -3, 1e-9, 2.5e30, chance.randrange(100)])
        if kind < 4:
            return "".join(chance.choice('a"\\\n\té{}[]:,') for _ in range(chance.randrange(6)))
        if kind == 4:
            return [value(depth + 1) for _ in range(chance.randrange(4))]
        names = ["".join(chance.choice('ab"\\') for _ in range(3)) for _ in range(3)]
        return {name: value(depth + 1) for name in names[: chance.randrange(4)]}

    for _ in range(1000):
        made = {f"k{i}": value() for i in range(chance.randrange(4))}
        text = json.dumps(made, ensure_ascii=chance.random() < 0.5)
        scanner, cut = JsonText(), chance.randrange(len(text) + 1)
        taken = scanner.feed(text[:cut]) + scanner.feed(text[cut:] + "tail")
        assert scanner.done and not scanner.broken and taken == len(text) == scanner.length
        assert {k: json.loads(scanner.part(*at)) for k, at in scanner.members.items()} == made
        at = chance.randrange(1, len(text))
        wrong = text[:at] + chance.choice('"{}[],:x1\\ ') + text[at + chance.randrange(2) :]
        scanner = JsonText()
        taken = scanner.feed(wrong)
        try:
            assert json.JSONDecoder().raw_decode(wrong)[1] == taken and scanner.done
        except ValueError:
            assert not scanner.done, wrong


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "5", "5"), ({"type": "integer"}, "5", 5),
        ({"type": "integer"}, "x", "x"), ({"type": "boolean"}, "True", True),
        ({"type": ["string", "null"]}, "None", None),
        ({"type": "array"}, '["a", 1]', ["a", 1]), ({}, "[1", "[1"), ({}, "1.5", 1.5),
        ({"enum": ["a", "5"]}, "5", "5"), ({"type": "object"}, '{"a": NaN}', '{"a": NaN}'),
    ],
)  # fmt: skip
def test_parameters_that_are_written_as_text(schema: dict[str, Any], text: str, value: Any):
    own = written({"properties": {"k": schema}}, "k")
    assert (text if own.text else json.loads(own.json(text))) == value


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ('{{- "<tool_call>\\n{\\"name\\": <name>, \\"arguments\\": <args>}\\n</tool_call>" }}',
         Form("json")),
        ("<tool_call>\n{\"name\": \"' + c.name + '\", \"arguments\": ' }}<think>",
         Form("json", True)),
        ("<tool_call>\n<function=example>\n<parameter=x>", Form("xml")),
        ("<tool_call>{name}\n<arg_key>{k}</arg_key>", Form()),
        ('{"name": function name, "parameters": dictionary of argument name and its value}',
         Form("bare")),
        ("{{- '<|python_tag|>' + tool_call.name + '.call(' }}", Form("bare")),
        ("<|start|>assistant<|channel|>analysis<|message|>", Form("harmony")),
        ("<|im_start|>{{ m.content.split('<think>') }}", Form("", True)),
        ("{{ messages[0].content }}", Form()),
    ],
)  # fmt: skip
def test_the_form_is_what_the_template_itself_has(template: str, form: Form):
    assert form_of(template) == form
    assert Tokenizer(byte_pairs()).chat_template.form(template) == form


MARKS = {
    "harmony": (
        *("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>"),
        *("<|call|>", "<|return|>"),
    ),
    "json": ("<tool_call>", "</tool_call>", "<think>", "</think>"),
}


def tokenizer(*control: str) -> Tokenizer:
    metadata = byte_pairs()
    for key, more in (("tokens", list(control)), ("token_type", [3] * len(control))):
        metadata[f"tokenizer.ggml.{key}"] = [*metadata[f"tokenizer.ggml.{key}"], *more]
    return Tokenizer(metadata)


def random_answer(own: Tokenizer, form: Form, seed: int, prompt: str, **asked: Any) -> Answer:
    grammar = enforced(form, own, form.opened(prompt), **asked)
    constraint = own.guide.constraint(grammar)
    size = own.vocab_size
    found = Answer(
        own, Sampling(seed=seed, temperature=1, top_k=0), size, 401, 400, constraint, form.marks
    )
    found.begin([1])
    chance = np.random.default_rng(seed)
    likely = [i for c in ("<", "/", "</", '"', "}", "\n") for i in own.encode_continued(c)]
    words = [i for text in ("</think>", "\n</parameter>\n") for i in own.encode_continued(text)]
    while found.reason is None:
        row = chance.standard_normal(size).astype(np.float32)
        row[likely] += 3
        row[own.ids_of_kind(3)] += 4
        row[words[len(found.tokens) % len(words)]] += 4
        found.feed(row)
    return found


@pytest.mark.parametrize("form", [JSON, XML, BARE, HARMONY], ids=lambda form: form.kind)
@pytest.mark.parametrize("control", [False, True], ids=["text", "tokens"])
def test_a_required_call_is_one_of_the_tools(form: Form, control: bool):
    own = tokenizer(*MARKS.get(form.kind, ())) if control else tokenizer()
    tools, ended = {"get": GET, "two": NONE}, 0
    for seed in range(12):
        prompt = "<think>" if form.thinks and seed % 3 == 2 else ""
        found = random_answer(
            own, form, seed, prompt, content=None, tools=tools, many=seed % 2 == 0
        )
        if found.reason == "end":
            ended += 1
            reader = form.reader(prompt, tools)
            reader.feed(found.text)
            reader.close()
            assert reader.calls and not reader.message["content"]
            assert seed % 2 == 0 or len(reader.calls) == 1
            for call in reader.calls:
                free = form.kind == "xml" and call.name == "get"  # text has no length there
                schema = {**GET, "properties": {**GET["properties"], "city": {}}}
                jsonschema.validate(
                    json.loads(call.arguments), schema if free else tools[call.name]
                )
    assert ended >= 4


@pytest.mark.parametrize("form", [JSON, BARE, HARMONY, Form("", True)], ids=lambda form: form.kind)
def test_content_of_a_grammar_stands_behind_reasoning(form: Form):
    own, ended = tokenizer(*MARKS["json"], *MARKS["harmony"]), 0
    asked = [{"json_schema": GET}, {"regex": "(ab){1,3}"}, {"grammar": 'root ::= "x" [a-c]'}]
    for seed, content in enumerate(3 * [asked_grammar(each) for each in asked]):
        prompt = "<think>\n" if form.thinks else ""
        found = random_answer(own, form, seed, prompt, content=content, tools={}, many=True)
        if found.reason == "end":
            ended += 1
            reader = form.reader(prompt)
            reader.feed(found.text)
            reader.close()
            text = reader.message["content"]
            if seed % 3 == 0:
                jsonschema.validate(json.loads(text), GET)
            else:
                assert set(text) <= set("abcx") and 2 <= len(text) <= 6
    assert ended >= 4


def function(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": GET}}


@pytest.mark.parametrize(
    ("choice", "shown", "required", "many"),
    [
        (None, True, [], True), ("auto", True, [], True), ("none", False, [], True),
        ("required", True, ["a", "b"], True), ("b", True, ["b"], False),
        ({"type": "function", "function": {"name": "a"}}, True, ["a"], False),
    ],
)  # fmt: skip
def test_which_tools_there_are_to_choose_from(choice, shown, required, many):
    tools = [function("a"), function("b")]
    found = chosen_tools(tools, choice)
    assert found.shown == (tools if shown else None) and found.many == many
    assert list(found.required) == required and list(found.parameters) == ["a", "b"] * shown
