"""Tools for a chat: JSON descriptions as OpenAI's interface has them, or Python functions.

A function is described by its name, its docstring and its type hints:

    def weather(city: str, days: int = 1) -> str:
        \"\"\"The weather forecast.

        Args:
            city: Where.
            days: How many days ahead.
        \"\"\"
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

from runtime.ops.errors import OptionError, shown

_TYPES: dict[Any, dict[str, str]] = {
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    list: {"type": "array"},
    tuple: {"type": "array"},
    dict: {"type": "object"},
    Any: {},
}
_SECTION = re.compile(r"^\s*(Args|Arguments|Parameters|Returns?|Raises|Yields|Examples?):\s*$")
_ARGUMENT = re.compile(r"^\s*(\w+)\s*(?:\([^)]*\))?:\s*(.*)$")
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def tool_schemas(tools: Any) -> list[Mapping[str, Any]] | None:
    """The JSON descriptions of `tools`, None when there are none.

    Raises OptionError, one line, for what is neither a description nor a function that has one.
    """
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise OptionError(
            f"tools={shown(tools)} must be a list of functions or of their JSON descriptions"
        )
    return [_schema(tool) for tool in tools] or None


def tool_parameters(schemas: Sequence[Mapping[str, Any]] | None) -> dict[str, Mapping[str, Any]]:
    """name -> JSON schema of the parameters, of descriptions as `tool_schemas` gives them."""
    found: dict[str, Mapping[str, Any]] = {}
    for schema in schemas or ():
        own = schema.get("function", schema)
        own = own if isinstance(own, Mapping) else {}
        name, parameters = own.get("name"), own.get("parameters")
        if isinstance(name, str) and name:
            none = {"type": "object", "properties": {}, "additionalProperties": False}
            found[name] = parameters if isinstance(parameters, Mapping) and parameters else none
    return found


def _schema(tool: Any) -> Mapping[str, Any]:
    if isinstance(tool, Mapping):
        return tool
    if inspect.isfunction(tool) or inspect.ismethod(tool):
        return function_schema(tool)
    raise OptionError(f"the tool {shown(tool)} is neither a function nor a JSON description of one")


def function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The JSON description of a Python function.

    Raises OptionError naming the function and what its signature or docstring lacks.
    """
    name = function.__name__
    text, described, returns = _docstring(function)
    hints = _hints(function)
    properties: dict[str, Any] = {}
    required = []
    for parameter in _parameters(function):
        if parameter.name not in hints:
            raise OptionError(
                f"the tool {name} needs a type hint for its argument {parameter.name}"
            )
        if parameter.name not in described:
            raise OptionError(
                f"the tool {name} needs a line '{parameter.name}: ...' under 'Args:' in its "
                "docstring, which tells the model what to give"
            )
        schema = _type_schema(hints[parameter.name], f"{name}({parameter.name})")
        properties[parameter.name] = schema | _described(described[parameter.name])
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    found = {"name": name, "description": text, "parameters": parameters}
    return {"type": "function", "function": found | _returned(hints, returns)}


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except Exception as error:
        raise OptionError(
            f"the type hints of the tool {function.__name__} cannot be read: {error}"
        ) from None


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    found = list(inspect.signature(function).parameters.values())
    own = found[:1] and found[0].name in ("self", "cls") and found[0].annotation is found[0].empty
    return found[1:] if own else found


def _docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str], str]:
    """(description, argument -> description, description of the result)."""
    text = inspect.getdoc(function)
    if not text:
        raise OptionError(
            f"the tool {function.__name__} has no docstring, which tells the model what it does"
        )
    sections: dict[str, list[str]] = {"": []}
    current = sections[""]
    for line in text.splitlines():
        heading = _SECTION.match(line)
        if heading:
            current = sections.setdefault(heading[1].rstrip("s").replace("ument", ""), [])
        else:
            current.append(line)
    described = _arguments(sections.get("Arg", sections.get("Parameter", [])))
    returns = " ".join(line.strip() for line in sections.get("Return", []) if line.strip())
    return "\n".join(sections[""]).strip(), described, returns


def _arguments(lines: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    indents = [len(line) - len(line.lstrip()) for line in lines if line.strip()]
    last = None
    for line in lines:
        match = _ARGUMENT.match(line)
        if match and len(line) - len(line.lstrip()) == min(indents):
            last = match[1]
            found[last] = match[2].strip()
        elif last and line.strip():
            found[last] += " " + line.strip()
    return found


def _described(text: str) -> dict[str, Any]:
    """A description; "(choices: ["a", "b"])" at its end lists the values there are."""
    choices = _CHOICES.search(text)
    if not choices:
        return {"description": text}
    try:
        values = json.loads(choices[1])
    except ValueError:
        return {"description": text}
    return {"enum": values, "description": text[: choices.start()].strip()}


def _returned(hints: Mapping[str, Any], text: str) -> dict[str, Any]:
    if "return" not in hints:
        return {}
    try:
        schema = _type_schema(hints["return"], "the result")
    except OptionError:  # the model never writes a result, so its type is no reason to refuse
        return {}
    return {"return": schema | ({"description": text} if text else {})}


def _type_schema(hint: Any, where: str) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _values([member.value for member in hint], where)
    if origin is typing.Literal:
        return _values(list(arguments), where)
    if origin in (typing.Union, types.UnionType):
        return _union(arguments, where)
    if origin is list:
        return {"type": "array", "items": _type_schema(arguments[0], where)}
    if origin is tuple and ... not in arguments:
        return {"type": "array", "prefixItems": [_type_schema(a, where) for a in arguments]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type_schema(arguments[1], where)}
    try:
        return dict(_TYPES[hint])
    except (KeyError, TypeError):
        raise OptionError(
            f"the type hint {hint} of {where} has no JSON form: use str, int, float, bool, list, "
            "dict, Literal, Enum or a union of them, or give the tool as a JSON description"
        ) from None


def _union(arguments: Sequence[Any], where: str) -> dict[str, Any]:
    schemas = [_type_schema(a, where) for a in arguments if a is not type(None)]
    names = sorted({s["type"] for s in schemas if isinstance(s.get("type"), str)})
    if len(schemas) == 1:
        found = schemas[0]
    elif all(s.keys() == {"type"} and isinstance(s["type"], str) for s in schemas):
        found = {"type": names[0] if len(names) == 1 else names}
    else:
        found = {"anyOf": schemas}
    return found | ({"nullable": True} if type(None) in arguments else {})


def _values(values: list[Any], where: str) -> dict[str, Any]:
    kinds = [_TYPES.get(type(value), {}).get("type") for value in values]
    if None in kinds or not kinds:
        raise OptionError(f"the choices {shown(values)} of {where} have no JSON form")
    names = list(dict.fromkeys(kinds))
    return {"type": names[0] if len(names) == 1 else names, "enum": values}
