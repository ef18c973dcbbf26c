"""Hostile and damaged chat templates: one clear line or the right text, in bounded time and memory.

The guards are tested with small limits, so that nothing here would take long without them.
"""

from __future__ import annotations

import random
import time
import tracemalloc

import pytest

from runtime.errors import Error, TextError
from runtime.text import limits
from runtime.text.chat import CHATML, ChatTemplate

USER = [{"role": "user", "content": "Hi & <you>"}]


def refused(source: str, **names) -> str:
    """The line with which a template is refused."""
    with pytest.raises(TextError) as caught:
        ChatTemplate(source).render(USER, **names)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


@pytest.fixture
def small(monkeypatch):
    """Limits that a template reaches at once."""
    for name, value in {
        **{"SECONDS": 60, "TEXT": 2000, "MADE": 4000, "MADE_PER_GIVEN": 1, "_ITEMS": 200},
        **{"_BITS": 100, "_WIDTH": 50, "_PIECES": 100, "_SLOW_TEXT": 100},
    }.items():
        monkeypatch.setattr(limits, name, value)


GROWING = {
    "repeated": "{% set n = namespace(x='a') %}{% for i in range(20) %}"
    "{% set n.x = STEP %}{% endfor %}{{ n.x | length }}",
    "once": "{{ STEP }}",
}
LISTS = (
    "{% set n = namespace(x=('a',), y=('a',)) %}{% for i in range(10) %}"
    "{% set n.x = (n.x, n.x) %}{% set n.y = (n.y, n.y) %}{% endfor %}"
)
DEEP = (
    "{% set n = namespace(x=('a',)) %}{% for i in range(300) %}{% set n.x = (n.x,) %}{% endfor %}"
)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "step",
    [
        *("n.x ~ n.x", "n.x + n.x", "n.x * 3", "n.x | tojson | tojson", "n.x | replace('a', 'aa')"),
        *(
            "n.x.replace('a', 'aa')",
            "(n.x ~ 'b') | join(n.x)",
            "n.x.join(n.x + 'b')",
            "'%s%s' % (n.x, n.x)",
        ),
        *("'{0}{0}'.format(n.x)", "n.x | replace('a', '%a') | urlencode", "(n.x | list) * 2"),
        *("n.x[:] + n.x[:]", "n.x.translate({97: 'aa'})", "n.x | center(n.x | length + 9)"),
    ],
)
def test_texts_that_grow(step):
    assert "refused" in refused(GROWING["repeated"].replace("STEP", step))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "step",
    [
        *("'a' * 3000", "3000 * 'a'", "[1] * 3000", "2 ** 300", "9 ** 9 ** 9", "'%300000d' % 1"),
        *("'%*d' % (3000, 1)", "'{:30000}'.format(1)", "'{:{}}'.format(1, 3000)"),
        *("'a' | center(3000)", "'a'.ljust(3000)", "'a'.zfill(3000)", "'a' | indent(3000, true)"),
        *("'a\\tb'.expandtabs(3000)", "(1).to_bytes(3000, 'big')", "1.5 | round(3000, 'ceil')"),
        *("[1] | batch(3000, 2) | list", "[1] | slice(3000) | list", "{1: 2} | tojson(indent=300)"),
        *("[1, 2] | tojson(separators=('x' * 500, ':'))", "range(300) | join('abcdefgh')"),
        *(
            "('a' * 300) | wordwrap(1)",
            "('<' * 300) | striptags",
            "('a,' * 500).split(',') | length",
        ),
        *("strftime_now('%30000Y')", "(messages * 70) | tojson", "'%30000d' | format(1)"),
    ],
)
def test_big_texts_from_small_ones(step):
    line = refused(GROWING["once"].replace("STEP", step))
    assert "refused" in line and "too much text" not in line, "before it is made"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("built", [LISTS, DEEP], ids=["shared", "deep"])
@pytest.mark.parametrize(
    "use",
    [
        *("{{ n.x }}", "{{ n.x | string }}", "{{ n.x ~ 'a' }}", "{{ n.x | tojson }}"),
        *("{{ n.x == n.x[:1] }}", "{{ 1 in n.x }}", "{{ {n.x: 1} | length }}", "{{ {}[n.x] }}"),
        *("{{ [n.x] | unique | list }}", "{{ '%s' % n.x }}", "{{ ''.join([n.x]) }}"),
        *("{{ n.x is eq(n.x) }}", "{{ [n.x].index(1) }}", "{{ namespace(a=n.x) }}"),
        "{% for i in [1] %}{{ loop.changed(n.x) }}{% endfor %}",
    ],
)
def test_lists_that_are_exponential_or_deep(built, use):
    """Written, hashed or compared they would take for ever, or exhaust the C stack."""
    assert "too big or too deep" in refused(built + use)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(9000) %}{% for j in range(9000) %}{% endfor %}{% endfor %}",
        "{% for i in range(9000) %}{% for j in range(9000) if j < 0 %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
        "{{ f(30) }}",
        "{% for i in [1] recursive %}{% if loop.depth < 30 %}{{ loop([1]) ~ loop([1]) }}{% endif %}"
        "{% endfor %}",
    ],
)
def test_loops_without_end(source, monkeypatch):
    monkeypatch.setattr(limits, "MADE", 10**9)
    monkeypatch.setattr(limits, "SECONDS", 0.2)
    start = time.perf_counter()
    assert "longer than 0.2 seconds" in refused(source)
    assert time.perf_counter() - start < 5


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(900) %}0123456789{% endfor %}",
        "{% set x %}{% for i in range(900) %}0123456789{% endfor %}{% endset %}",
        "{% set n = namespace(x=[]) %}{% for i in range(900) %}"
        "{% set n.x = [n.x, [1, 2, 3, 4, 5]] %}{% endfor %}",
        "{% macro f() %}0123456789{% endmacro %}{% for i in range(900) %}{{ f() }}{% endfor %}",
        "{% for i in range(900) %}{{ messages[0].content }}{% endfor %}",
        "{% for i in range(900) %}{% set x = messages[0].content[1:] %}{% endfor %}",
        "{% for i in range(900) %}{% set x = messages[0].content.upper() %}{% endfor %}",
        "{% for i in range(900) %}{% set x = range(9) | list %}{% endfor %}",
        "{{ range(190) | map('string') | map('center', 40) | list | length }}",
    ],
)
def test_many_small_texts(source):
    assert "too much text" in refused(source)


def test_readings_of_messages_share_one_budget(monkeypatch):
    """A template that works long and then refuses is not run again and again."""
    monkeypatch.setattr(limits, "MADE", 4000)
    monkeypatch.setattr(limits, "MADE_PER_GIVEN", 0)
    source = "{{ 'a' * 1500 }}{{ messages[0].content + 1 }}"
    call = {"function": {"name": "f", "arguments": "{}"}}
    message = {"role": "user", "content": "", "thinking": "t", "tool_calls": [call]}
    with pytest.raises(TextError, match="too much text"):
        ChatTemplate(source).render([message])


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in x %}" * 21 + "{% endfor %}" * 21,
        "{% if x %}" * 120 + "{% endif %}" * 120,
        "{% macro a() %}" * 120 + "{% endmacro %}" * 120,
        "{{ " + "(" * 300 + "x" + ")" * 300 + " }}",
        "{{ " + "[" * 300 + "]" * 300 + " }}",
        "{{ x" + " + x" * 2000 + " }}",
        "{{ x" + ".a" * 2000 + " }}",
        "{{ x" + " if x else x" * 500 + " }}",
        "{% if x %}" + "{% elif x %}" * 3000 + "{% endif %}",
        "{{ " + "9" * 5000 + " }}",
        " " * (1 << 16) + " ",
    ],
)
def test_templates_that_cannot_be_compiled(source):
    assert "compile" in refused(source)


@pytest.mark.parametrize("source", ["{{ f() }}{% macro f() %}{{ f() }}{% endmacro %}"])
def test_endless_recursion_is_one_line(source):
    macro = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"
    assert "recursion" in refused(macro)
    assert "undefined" in refused(source)


def test_messages_too_deep_for_a_template_are_refused():
    deep: list = []
    for _ in range(300):
        deep = [deep]
    with pytest.raises(TextError, match="messages are too big"):
        ChatTemplate("").render([{"role": "user", "content": deep}])


def test_long_chats_are_well_within_the_limits():
    """100,000 words in 2,000 messages, each cut, joined and compared several times."""
    source = (
        "{% for m in messages %}{% set text = m.content | trim %}"
        "{% if text.startswith('x') and '</think>' in text %}{% set text = '' %}{% endif %}"
        "{{ '<' + m['role'] + '>' + text.split('|')[-1].lstrip('\\n') ~ '</>' }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "some words " * 25}] * 2000
    assert len(ChatTemplate(source).render(messages)) == 2000 * (len("<user></>") + 274)


# Templates of the kinds that models have: turns, tools, reasoning, macros, dates.
SEEDS = (
    CHATML,
    "{%- if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% endif %}{{ bos_token }}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.first and system is defined %}{{ '[' + system + '] ' }}{% endif %}"
    "{{ m.role | upper ~ ': ' ~ m.content | trim ~ eos_token }}{% endfor %}",
    "{% macro show(value, depth=0) %}{% if value is mapping %}{% for k, v in value | dictsort %}"
    "{{ ' ' * depth }}{{ k }}={{ show(v, depth + 1) }}{% endfor %}{% elif value is string %}"
    "{{ value | replace('\\n', ' ') | indent(4) }}{% else %}{{ value | tojson(indent=2) }}"
    "{% endif %}{% endmacro %}{% for t in tools or [] %}{{ show(t) }}{% endfor %}"
    "{% for m in messages %}{{ show(m) }}{% endfor %}",
    "{% set ns = namespace(last=-1, text='') %}{% for m in messages[::-1] %}"
    "{% if ns.last < 0 and m.role == 'user' %}{% set ns.last = messages | length - loop.index %}"
    "{% endif %}{% endfor %}{% for m in messages %}"
    "{% set c = m.content if m.content is string else '' %}"
    "{% if '</think>' in c %}{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and m.thinking %}{{ '<think>' + m.thinking + '</think>' }}"
    "{% endif %}"
    "{% set ns.text = ns.text ~ c %}{{ c }}{% for call in m.tool_calls or [] %}"
    "<call>{{ call.function | tojson }}</call>{% endfor %}{% endfor %}{{ ns.text | length }}",
    "{{ 'Today: ' ~ strftime_now('%d %b %Y') }}{% for m in messages | selectattr('role', 'in',"
    " ['user', 'assistant']) %}{% filter trim %}{{ '%s> %s' % (m.role, m.content) }}{% endfilter %}"
    "{% if not loop.last %}{{ '-' * 8 }}{% endif %}{% endfor %}"
    "{% for row in range(12) | batch(4, 0) %}{{ row | join(', ') }};{% endfor %}",
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": None, "thinking": "easy", "tool_calls": [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}]},
    {"role": "tool", "content": "4"},
]  # fmt: skip
PARTS = (
    *(
        "{% endfor %}",
        "{% endif %}",
        "{% for x in messages %}",
        "{% if messages %}",
        "{{ messages }}",
    ),
    *("99999999", "0", "-1", "1e9", " * 99999", " ** 9999", " ~ messages", " + messages", "[::-1]"),
    *("| tojson", "| list", "| length", "| center(9999)", "| join", "('", "')", "{{", "}}", "{%"),
    *("{% macro f(x) %}", "{{ f(messages) }}", "range(99999)", "{% set ns.text = ns.text * 2 %}"),
    *("%}", "'", "\\", "\0", "\ud800", "é", "{#", "loop", "recursive", "is none", "not ", "("),
)


def mutated(seed: int) -> str:
    """A template of `SEEDS` with one to six changes."""
    rng = random.Random(seed)
    text = rng.choice(SEEDS)
    for _ in range(rng.randint(1, 6)):
        a, b = sorted(rng.choices(range(len(text) + 1), k=2))
        b = min(b, a + rng.choice((1, 3, 40)))
        c = rng.randrange(len(text) + 1)
        text = rng.choice(
            (
                text[:a] + text[b:],
                text[:b] + text[a:b] * rng.choice((1, 2, 30)) + text[b:],
                text[:c] + text[a:b] + text[c:],
                text[:a] + rng.choice(PARTS) + text[b:],
                text[:c] + rng.choice(PARTS) + text[c:],
                text[:a] + chr(rng.randrange(32, 126)) + text[a + 1 :],
            )
        )
    return text


@pytest.mark.parametrize(
    "seeds", [range(200), pytest.param(range(200, 2000), marks=pytest.mark.sweep)], ids=len
)
@pytest.mark.filterwarnings("ignore:invalid escape:DeprecationWarning")
def test_mutated_templates(seeds, monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 1.0)
    refusals = 0
    tracemalloc.start()
    for seed in seeds:
        source, start = mutated(seed), time.perf_counter()
        try:
            text = ChatTemplate(source).render(CHAT, tools=[{"function": {"name": "add"}}])
            assert len(text) <= limits.TEXT, seed
        except Error as error:
            refusals += 1
            assert "\n" not in str(error) and len(str(error)) < 400, seed
        assert time.perf_counter() - start < 10, seed
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500 << 20
    assert len(seeds) // 10 < refusals < len(seeds), "some changes break a template, some do not"
