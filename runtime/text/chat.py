"""Chat templates: a list of messages to the prompt a model was trained on.

Templates are Jinja programs from the model's file, so they run in jinja2's immutable sandbox.
They may use what Hugging Face templates may: loop controls, `raise_exception`, `strftime_now`,
`{% generation %}` blocks, and a `tojson` that escapes nothing for HTML.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

from runtime.ops.errors import TextError
from runtime.text.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The template of files that have none: ChatML, which most instruction models understand."""

_KEY = "tokenizer.chat_template"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTemplate:
    """A model's chat template.

    `ChatTemplate.of(tokenizer, metadata)` reads it from a file; `render` gives text, `encode`
    gives ids. `is_default` says that the file had none and ChatML stands in.
    """

    def __init__(
        self, source: str | None, special: Mapping[str, str] | None = None, tools: str | None = None
    ):
        """`source` is the template, `tools` the one for calls with tools, `special` the texts of
        `bos_token` and its like."""
        self.is_default = not source
        self.source = source or CHATML
        self._tools_source = tools
        self._special = dict(special or {})

    @classmethod
    def of(cls, tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> ChatTemplate:
        """The template under `tokenizer.chat_template`, or ChatML.

        Raises TextError when the key holds something else than text.
        """
        source, tools = metadata.get(_KEY), metadata.get(f"{_KEY}.tool_use")
        for value in (source, tools):
            if value is not None and not isinstance(value, str):
                raise TextError(f"{_KEY} is {type(value).__name__}, not text")
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        for name, key in (("unk_token", "unknown"), ("pad_token", "padding")):
            ids[name] = metadata.get(f"tokenizer.ggml.{key}_token_id")
        special = {
            name: tokenizer.token_text(int(token))
            for name, token in ids.items()
            if token is not None and 0 <= token < tokenizer.vocab_size and tokenizer.has_text
        }
        return cls(source, special, tools)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        **extra: Any,
    ) -> str:
        """The prompt for `messages`, each a mapping with `role` and `content`.

        `add_generation_prompt` opens the assistant's turn; `tools` and `extra` reach the template
        under their names. Raises TextError, in one line, for a template that is broken or that
        refuses the messages.
        """
        _check(messages)
        template = self._tools_template if tools and self._tools_source else self._template
        names: dict[str, Any] = dict.fromkeys(_SPECIAL, "")
        names |= {**self._special, "documents": None, "tools": tools, **extra}
        names |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return template.render(names)
        except Exception as error:
            _refuse("the chat template cannot take these messages", error)

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], **options: Any
    ) -> list[int]:
        """The ids of `render(messages, **options)`, with one BOS where the model wants it."""
        ids = tokenizer.encode(self.render(messages, **options), add_special=False)
        bos = tokenizer.bos_id
        if tokenizer.add_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids

    @cached_property
    def _template(self) -> Any:
        return _compile(self.source)

    @cached_property
    def _tools_template(self) -> Any:
        return _compile(self._tools_source or self.source)


def _check(messages: Sequence[Mapping[str, Any]]) -> None:
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise TextError(f"message {i} is no mapping with 'role' and 'content': {message!r}")


def _compile(source: str) -> Any:
    from jinja2 import TemplateError

    try:
        return _environment().from_string(source)
    except (TemplateError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        _refuse(f"the chat template is broken{f' in line {line}' if line else ''}", error)


def _refuse(what: str, error: Exception) -> NoReturn:
    reason = " ".join(str(error).split()) or type(error).__name__
    raise TextError(f"{what}: {reason}") from error


def _environment() -> Any:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words for training; here it only groups."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
