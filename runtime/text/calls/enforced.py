"""Grammars of answers that have to call a tool, or whose content has to be of a grammar."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from runtime.ops.errors import OptionError
from runtime.text.calls import harmony, tagged
from runtime.text.calls.forms import Form
from runtime.text.calls.parameters import written
from runtime.text.grammar.asked import Grammar, json_schema_text

if TYPE_CHECKING:
    from runtime.text.tokenizer import Tokenizer

Tools = Mapping[str, Mapping[str, Any]]

_ANY = r"/(?s:.*)/"


def enforced(
    form: Form, tokenizer: Tokenizer, opened: bool, content: Grammar | None, tools: Tools,
    many: bool,
) -> Grammar:  # fmt: skip
    """The grammar of a whole answer: calls of `tools`, or content of a grammar where there is one.

    opened: the prompt ends inside of reasoning, which comes first then, as it may in channels.
    many: several calls may follow one another. Raises OptionError for tools where the form has
    no calls.
    """
    if tools and not form.kind:
        raise OptionError(
            "tool_choice cannot be enforced: the chat template of this model has calls written "
            "in a form that is not known"
        )
    if content is not None and not tools and not opened and form.kind != "harmony":
        return content
    rules = dict(_Rules(form, tokenizer).all(opened, content is not None, tools, many))
    main = "\n".join(f"{name}: {rule}" for name, rule in rules.items())
    option = "tool_choice" if content is None else content.option
    return Grammar(option, "lark", main, content)


class _Rules:
    """Of one form, in Lark."""

    def __init__(self, form: Form, tokenizer: Tokenizer) -> None:
        self._form, self._tokenizer = form, tokenizer

    def all(
        self, opened: bool, content: bool, tools: Tools, many: bool
    ) -> Iterator[tuple[str, str]]:
        """(name, rule) of an answer."""
        channels = self._form.kind == "harmony"
        ways = ["content"] * content + ["calls"] * bool(tools)
        before = "thought? " if channels else "thought " if opened else ""
        yield "start", f"{before}({' | '.join(ways)})"
        if channels:
            mark = self._mark
            yield (
                "thought",
                (
                    f'{mark(harmony.CHANNEL)} "analysis" {mark(harmony.MESSAGE)} ANY '
                    f'{mark(harmony.END)} {mark(harmony.START)} "assistant"'
                ),
            )
            yield "ANY", _ANY
        elif opened:
            yield from self._thought()
        if content:
            final = f'{self._mark(harmony.CHANNEL)} "final" {self._mark(harmony.MESSAGE)} '
            yield "content", f"{final if channels else ''}@content"
        if tools:
            several = many and self._form.kind in ("json", "xml")
            yield "calls", 'call ("\\n" call)*' if several else "call"
            yield "call", " | ".join(f"call_{n}" for n in range(len(tools)))
            for n, (name, schema) in enumerate(tools.items()):
                yield from self._call(n, name, schema)

    def _thought(self) -> Iterator[tuple[str, str]]:
        """The rest of reasoning that the prompt has begun."""
        end = self._mark(tagged.THOUGHT)
        if end.startswith("<"):
            yield "thought", f'ANY {end} "\\n\\n"'
            yield "ANY", _ANY
        else:
            yield "thought", 'thinking "\\n\\n"'
            yield "thinking[lazy]", r"/(?s:.*)<\/think>/"

    def _call(self, n: int, name: str, schema: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        kind = self._form.kind
        quoted = json.dumps(name, ensure_ascii=False)
        if kind == "xml":
            yield from self._tagged(n, name, schema)
            return
        arguments = f"%json {_arguments(schema)}"
        if kind == "harmony":
            to = _text(f"commentary to=functions.{name} ")
            yield (
                f"call_{n}",
                (
                    f"{self._mark(harmony.CHANNEL)} {to} {self._mark(harmony.CONSTRAIN)} "
                    f'"json" {self._mark(harmony.MESSAGE)} {arguments}'
                ),
            )
        elif kind == "json":
            begin = _text(f'\n{{"name": {quoted}, "arguments": ')
            yield (
                f"call_{n}",
                (
                    f"{self._mark(tagged.CALL)} {begin} {arguments} {_text('}' + chr(10))} "
                    f"{self._mark(tagged.CALLED)}"
                ),
            )
        else:
            begin = _text(f'{{"name": {quoted}, "parameters": ')
            yield f"call_{n}", f'{begin} {arguments} "}}"'

    def _tagged(self, n: int, name: str, schema: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        properties = schema.get("properties")
        properties = properties if isinstance(properties, Mapping) else {}
        required = schema.get("required") or ()
        parts = [f"p_{n}_{i}{'' if key in required else '?'}" for i, key in enumerate(properties)]
        begin, end = _text(f"\n<function={name}>\n"), _text("</function>\n")
        opening, closing = self._mark(tagged.CALL), self._mark(tagged.CALLED)
        yield f"call_{n}", " ".join([opening, begin, *parts, end, closing])
        for i, (key, own) in enumerate(properties.items()):
            before, after = _text(f"<parameter={key}>\n"), _text("\n</parameter>\n")
            values = own.get("enum") if isinstance(own, Mapping) else None
            if not written(schema, key).text:
                rule = f"{before} %json {_guided(own)} {after}"
            elif isinstance(values, list):
                some = " | ".join(_text(value) for value in values)
                rule = f"{before} ({some}) {after}"
            else:
                rule = f"{before} text_{n}_{i}"
                yield f"text_{n}_{i}[lazy]", r"/(?s:.*)\n<\/parameter>\n/"
            yield f"p_{n}_{i}", rule

    def _mark(self, text: str) -> str:
        """A mark as a token where it is a control token, else as text."""
        token = self._tokenizer.control_id(text)
        return _text(text) if token is None else f"<[{token}]>"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _arguments(schema: Mapping[str, Any]) -> str:
    """The schema of a tool's parameters, which are an object."""
    return _guided({"type": "object", **schema})


def _guided(schema: Any) -> str:
    return json_schema_text(schema, "tool_choice", compact=True)
