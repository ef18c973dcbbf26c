"""What an answer has to be: JSON of a schema, or text of a grammar or a regular expression."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from runtime.arguments import wrong
from runtime.ops.errors import OptionError, shown

OPTIONS = ("json_schema", "grammar", "regex")
"""The options that ask for one; only one of them can be given."""

_LONGEST = 1 << 20  # characters of a grammar
# White space inside JSON: enough to indent with, and an end to it.
_SPACE, _COMPACT = r"(\x20{1,4}|\n[\x20\t]{0,24})", r"\x20"
# With others a name could be written twice, in two ways; they are for names and constants alone.
_ESCAPES, _CONTROL = '"\\bfnrt', re.compile(r"\\u00[01]|\\u007f|\x7f")

# Of drafts 3 and of extensions; what is unknown is ignored, as the standard has it.
_CHANGE_MEANING = (
    *("divisibleBy", "disallow", "extends", "formatMinimum", "formatMaximum"),
    *("formatExclusiveMinimum", "formatExclusiveMaximum"),
)
_NOISE = re.compile(r"[\s^]*$|\s*\d+ \| |<non-verbose/>")  # of a message: what it quotes
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")  # name -> schema
_LISTED = ("allOf", "anyOf", "oneOf", "prefixItems", "items", "type")
_SINGLE = ("items", "additionalItems", "additionalProperties")


class Grammar(NamedTuple):
    """What was asked for by `option`; `source` is JSON, a grammar or a regular expression.

    kind: "json", "gbnf", "lark" or "regex". content: what "@content" stands for in it.
    """

    option: str
    kind: str
    source: str
    content: Grammar | None = None


def asked_grammar(given: Mapping[str, Any]) -> Grammar | None:
    """The grammar that those of `OPTIONS` in `given` ask for, or None.

    Raises OptionError for two of them, for what is no schema or text, and for a keyword of a
    schema that cannot be enforced.
    """
    asked = {name: given[name] for name in OPTIONS if given.get(name) is not None}
    if len(asked) > 1:
        raise OptionError(f"{' and '.join(asked)} cannot go together: give one of them")
    for option, value in asked.items():
        if option == "json_schema":
            return Grammar(option, "json", json_schema_text(value))
        if not isinstance(value, str) or not value:
            raise wrong(option, value, "text of at least one character")
        if len(value) > _LONGEST:
            raise OptionError(f"{option} has {len(value)} characters and may have {_LONGEST}")
        kind = "regex" if option == "regex" else "gbnf" if "::=" in value else "lark"
        return Grammar(option, kind, value)
    return None


def json_schema_text(value: Any, option: str = "json_schema", compact: bool = False) -> str:
    """A JSON schema, given as a mapping, as True (any JSON) or as text, as text.

    It says itself which white space there may be; compact: hardly any.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise OptionError(f"{option} is no JSON: {error}") from None
    if not isinstance(value, Mapping | bool):
        raise wrong(option, value, "a JSON schema: a mapping, its JSON text, or True for any JSON")
    try:
        whole = {} if value is True else {"not": {}} if value is False else dict(value)
        options = {"whitespace_pattern": _COMPACT if compact else _SPACE}
        if not _CONTROL.search(json.dumps(whole)):
            options["json_allowed_escapes"] = _ESCAPES
        text = json.dumps({**whole, "x-guidance": options}, allow_nan=False)
        refused = next((name for found in _schemas(value) for name in _refused(found)), None)
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"{option} cannot be written as JSON: {error}") from None
    if refused is not None:
        raise OptionError(f"{option} uses {refused}, which cannot be enforced: leave it out")
    if len(text) > _LONGEST:
        raise OptionError(f"{option} has {len(text)} characters and may have {_LONGEST}")
    return text


def _refused(schema: Mapping[str, Any]) -> Iterator[str]:
    """Keywords that nothing enforces and nothing else refuses."""
    yield from (name for name in _CHANGE_MEANING if name in schema)
    least, required = schema.get("minProperties"), schema.get("required")
    have = len(set(required)) if isinstance(required, list | tuple) else 0
    if isinstance(least, int) and least > have + 1:  # of further names one may come twice
        yield f"minProperties {least} with {have} required properties"
    if schema.get("format") == "unknown":
        yield "the format 'unknown'"


def _schemas(value: Any) -> Iterator[Mapping[str, Any]]:
    """A schema and all schemas in it."""
    if not isinstance(value, Mapping):
        return
    yield value
    for name in _BY_NAME:
        inner = value.get(name)
        for schema in inner.values() if isinstance(inner, Mapping) else ():
            yield from _schemas(schema)
    for name in _LISTED:
        inner = value.get(name)
        for schema in inner if isinstance(inner, list | tuple) else ():
            yield from _schemas(schema)
    for name in _SINGLE:
        yield from _schemas(value.get(name))


def refusal(option: str, message: str) -> OptionError:
    """The error for a grammar that was refused with this message, in one line."""
    lines = [line.strip() for line in message.strip().splitlines() if not _NOISE.match(line)]
    if lines and lines[0].startswith("Unimplemented keys: "):
        names = ", ".join(json.loads(lines[0].partition(": ")[2]))
        return OptionError(f"{option} uses {names}, which cannot be enforced: leave it out")
    if lines and lines[0].startswith("Unknown format: "):
        name = shown(lines[0].partition(": ")[2])
        return OptionError(
            f"{option} uses the format {name}, which cannot be enforced: leave it out"
        )
    text = "; ".join(lines) or "it is empty"
    text = text if len(text) <= 300 else f"{text[:297]}..."
    return OptionError(f"{option} cannot be met or enforced: {text}")
