"""Chat templates: what templates of model files may use, and what happens when they fail."""

from __future__ import annotations

from datetime import datetime

import pytest
from vocabularies import byte_pairs, scored

from runtime.errors import TextError
from runtime.text.chat import ChatTemplate
from runtime.text.tokenizer import Tokenizer

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


@pytest.mark.parametrize("message", ["text", {"content": "no role"}])
def test_messages_have_roles(message):
    with pytest.raises(TextError, match="message 0"):
        ChatTemplate(None).render([message])


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
