"""Messages as chat templates want them.

Users write messages as OpenAI's interface does: `content` may be None beside tool calls,
reasoning goes under one of three names, arguments of tool calls are JSON text. Templates differ
in what they can take of that. So the messages have several READINGS: the first is the form that
Hugging Face templates are written for, and later ones count only where a template refuses it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from runtime.arguments import listed
from runtime.ops.errors import TextError, shown

Message = dict[str, Any]

_REASONING = ("reasoning_content", "thinking", "reasoning")


def plain_messages(messages: Any) -> list[Message]:
    """A copy of `messages` in plain JSON types.

    Raises TextError, one line, for no messages, and OptionError for what is no list.
    """
    legal = "a list such as [{'role': 'user', 'content': 'Hi'}]"
    found = [plain(message) for message in listed("messages", messages, legal)]
    for i, message in enumerate(found):
        if not isinstance(message, dict) or "role" not in message:
            raise TextError(
                f"message {i} is no mapping with 'role' and 'content': {shown(message)}"
            )
        if message["role"] in ("user", "system") and message.get("content") is None:
            raise TextError(f"message {i}, of role {message['role']!r}, has no 'content'")
    if not found:
        raise TextError("there are no messages: give at least one")
    return found


def plain(value: Any) -> Any:
    """`value` rebuilt from JSON types, so that a template can reach no object of the program.

    numpy scalars, dataclasses and pydantic models become what they stand for; of anything else,
    an image for example, only the name of its type is left.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [plain(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, np.generic):
        return plain(value.item())
    for base in (str, int, float):
        if isinstance(value, base):
            return base(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return plain(value.model_dump())
    return f"<{type(value).__name__}>"


def readings(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The forms of `messages` to offer a template, the likeliest first; never none."""
    given = [{k: v for k, v in message.items() if v is not None} for message in messages]
    seen: list[list[Message]] = []
    for parts, arguments, reasoning, content in product(
        (_same, _joined_parts),
        (_same, _parsed_arguments, _written_arguments),
        (_named_reasoning, _same),
        (_same, _content_none, _content_empty),
    ):
        form = [content(reasoning(arguments(parts(message)))) for message in given]
        if form not in seen:
            seen.append(form)
            yield form


def tool_names(messages: Sequence[Message]) -> list[str]:
    """The functions called by messages without content.

    A template that looks for `content is none` may leave them out where there is no content.
    """
    calls = [c for m in messages if m.get("content") is None for c in _calls(m)]
    functions = [c.get("function", c) for c in calls if isinstance(c, dict)]
    names = [f.get("name") for f in functions if isinstance(f, dict)]
    return [name for name in names if isinstance(name, str)]


def no_text(messages: Sequence[Message]) -> str:
    """Names the first part of a content that is not text; "" where all of them are."""
    for n, message in enumerate(messages):
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            kind = part.get("type", "text") if isinstance(part, dict) else "text"
            if kind != "text":
                return f"message {n} has a part of type {kind!r}, which is no text"
    return ""


def _same(message: Message) -> Message:
    return message


def _content_none(message: Message) -> Message:
    return {**message, "content": message.get("content")}


def _content_empty(message: Message) -> Message:
    return {**message, "content": message.get("content", "")}


def _named_reasoning(message: Message) -> Message:
    """Reasoning under both names that templates read."""
    found = next((message[name] for name in _REASONING if name in message), None)
    if found is None:
        return message
    return {"thinking": found, **message, "reasoning_content": found}


def _joined_parts(message: Message) -> Message:
    """The content as one text where it is a list of parts that are all text."""
    parts = message.get("content")
    if not isinstance(parts, list) or not all(isinstance(p, dict) for p in parts):
        return message
    texts = [p.get("text") for p in parts if p.get("type", "text") == "text"]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        return message
    return {**message, "content": "\n".join(texts)}


def _parsed_arguments(message: Message) -> Message:
    """Arguments of tool calls as mappings where they are the text of a JSON object."""
    return _with_arguments(message, _parsed)


def _written_arguments(message: Message) -> Message:
    """Arguments of tool calls as JSON text where they are mappings."""
    return _with_arguments(
        message, lambda value: json.dumps(value) if isinstance(value, dict) else value
    )


def _with_arguments(message: Message, change: Callable[[Any], Any]) -> Message:
    calls = [_changed_call(call, change) for call in _calls(message)]
    return {**message, "tool_calls": calls} if calls else message


def _changed_call(call: Any, change: Callable[[Any], Any]) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _changed_call(call["function"], change)}
    return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call


def _parsed(value: Any) -> Any:
    try:
        parsed = json.loads(value)
    except (TypeError, ValueError, RecursionError):
        return value
    return parsed if isinstance(parsed, dict) else value


def _calls(message: Message) -> list[Any]:
    calls = message.get("tool_calls")
    return calls if isinstance(calls, list) else []
