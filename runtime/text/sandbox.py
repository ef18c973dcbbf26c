"""Where chat templates run: jinja2's immutable sandbox, as Hugging Face templates expect it.

Templates are programs from a model's file. They may use loop controls, `raise_exception`,
`strftime_now`, `{% generation %}` blocks, `from_json`, and a `tojson` that escapes nothing for
HTML. What a rendering may cost is in limits.py; `guards.py` asks there at every place of a
template that takes time or makes something.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from types import GeneratorType
from typing import Any, NoReturn

from runtime.ops.errors import TextError
from runtime.text import limits
from runtime.text.limits import Budget, LimitError, growth, size_of

_LONGEST = 1 << 16  # characters of a template, some seconds to compile; real ones have 20,000


class TemplateLimitError(TextError):
    """A chat template wants more time or memory than a rendering may use."""


class Template:
    """A compiled template. `names`: the variables it asks for.

    Raises TextError, in one line, when it cannot be compiled.
    """

    def __init__(self, source: str):
        from jinja2 import TemplateError, nodes

        if len(source) > _LONGEST:
            raise TextError(f"the chat template has {len(source)} characters: too many to compile")
        environment = _environment()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python's, about the code that jinja2 writes
                tree = environment.parse(source)
                self.names = frozenset(n.name for n in tree.find_all(nodes.Name) if n.ctx == "load")
                self._template = environment.from_string(tree)
        except TemplateError as error:
            line = getattr(error, "lineno", None)
            _refuse(f"the chat template is broken{f' in line {line}' if line else ''}", error)
        except (SyntaxError, RecursionError, MemoryError, ValueError, OverflowError) as error:
            _refuse("the chat template is too deep or too big to be compiled", error)

    def budget(self, given: Any) -> Budget:
        """What rendering `given`, messages and other names, may cost in all."""
        try:
            return Budget(size_of(given))
        except LimitError as error:
            raise TemplateLimitError(f"these messages are too big: {error}") from error

    def render(self, names: Mapping[str, Any], budget: Budget) -> str:
        """The text with `names` filled in.

        Raises TextError, in one line, where that fails, TemplateLimitError where it costs more
        than `budget` has left.
        """
        from runtime.text.guards import using

        try:
            with using(budget):
                text = self._template.render(names)
            if len(text) > limits.TEXT:
                raise LimitError(f"it makes {len(text)} characters of text")
            return text
        except LimitError as error:
            raise TemplateLimitError(f"the chat template is refused: {error}") from error
        except Exception as error:
            _refuse("the chat template cannot take these messages", error)


def _refuse(what: str, error: Exception) -> NoReturn:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    raise TextError(f"{what}: {reason}") from error


@cache
def _environment() -> Any:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension

    from runtime.text.guards import GuardedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words for training; here it only groups."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = GuardedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.add_filter("tojson", _to_json)
    environment.add_filter("from_json", json.loads)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = _now
    return environment


def _now(pattern: str) -> str:
    growth("strftime", pattern, ())
    return datetime.now().strftime(pattern)


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
