"""Where chat templates run: jinja2's immutable sandbox, as Hugging Face templates expect it.

Templates are programs from a model's file. They may use loop controls, `raise_exception`,
`strftime_now`, `{% generation %}` blocks, and a `tojson` that escapes nothing for HTML.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from types import GeneratorType
from typing import Any, NoReturn

from runtime.ops.errors import TextError


class Template:
    """A compiled template. `names`: the variables it asks for.

    Raises TextError, in one line, when it cannot be compiled.
    """

    def __init__(self, source: str):
        from jinja2 import TemplateError, meta

        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self.names = frozenset(meta.find_undeclared_variables(environment.parse(source)))
        except TemplateError as error:
            line = getattr(error, "lineno", None)
            _refuse(f"the chat template is broken{f' in line {line}' if line else ''}", error)
        except (SyntaxError, RecursionError, MemoryError, ValueError, OverflowError) as error:
            _refuse("the chat template is nested too deep to be compiled", error)

    def render(self, names: Mapping[str, Any]) -> str:
        """The text with `names` filled in. Raises TextError, in one line, where that fails."""
        try:
            return self._template.render(names)
        except Exception as error:
            _refuse("the chat template cannot take these messages", error)


def _refuse(what: str, error: Exception) -> NoReturn:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    raise TextError(f"{what}: {reason}") from error


@cache
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
    environment.filters["from_json"] = json.loads
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
        default=_listed,
    )


def _listed(value: Any) -> Any:
    """What a filter made lazily, as a list."""
    if isinstance(value, GeneratorType):
        return list(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
