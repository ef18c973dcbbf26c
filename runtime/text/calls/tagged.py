"""Answers with tags: <think>, <tool_call> around JSON or <function=...>, and bare JSON."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from runtime.text.calls.json_text import JsonText
from runtime.text.calls.parameters import written
from runtime.text.calls.reader import SPACE, Reader, first, held

THINK, THOUGHT = "<think>", "</think>"
CALL, CALLED = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
PYTHON = "<|python_tag|>"

_NAME = re.compile(r"[\w.:/-]{1,128}")
_BUILT_IN = re.compile(r"\s*([\w.-]+)\.call\((.*)\)\s*", re.DOTALL)
_CODE = ("python", "code_interpreter", "ipython")  # tools that take what is no call


class TaggedReader(Reader):
    """Answers of the forms "json", "xml" and "bare" (see `runtime.text.calls.forms`)."""

    def __init__(
        self, form: str, thinks: bool, opened: bool,
        tools: Mapping[str, Mapping[str, Any]] | None = None,
        new_id: Callable[[], str] | None = None,
    ) -> None:  # fmt: skip
        """thinks: reasoning stands in <think>; opened: which the prompt has begun."""
        super().__init__(tools, new_id)
        self._thinks, self._bare = thinks and not opened, form == "bare"
        self._json, self._sent, self._value = JsonText(), 0, 0
        self._parameter, self._parameters = "", 0
        marks = {"json": (CALL,), "xml": (CALL, FUNCTION), "bare": (PYTHON,)}.get(form, ())
        self._marks = marks if self._tools else ()
        if opened:
            self._state = self._reasoning

    def _content(self, final: bool) -> bool:
        space = len(self._rest) - len(self._rest.lstrip(SPACE))
        begins = self._content_flow.empty
        if begins and self._bare and self._tools and self._rest[space : space + 1] == "{":
            self._enter(space)
            return self._begin_json()
        marks = (*self._marks, THINK) if self._thinks and begins else self._marks
        found = first(self._rest, marks)
        if found is not None and found[1] == THINK and found[0] != space:
            found = first(self._rest, self._marks)
        if found is None:
            self._say(self._read(len(self._rest) - (0 if final else held(self._rest, marks))))
            return False
        at, mark = found
        self._say(self._read(at))
        if mark == THINK:
            self._read(len(mark))
            self._content_flow.cut()
            self._state = self._reasoning
            return True
        self._enter(0 if mark == FUNCTION else len(mark))
        self._state = self._python if mark == PYTHON else self._tagged
        return True

    def _reasoning(self, final: bool) -> bool:
        at = self._rest.find(THOUGHT)
        if at < 0:
            self._think(
                self._read(len(self._rest) - (0 if final else held(self._rest, (THOUGHT,))))
            )
            return False
        self._think(self._read(at))
        self._read(len(THOUGHT))
        self._content_flow.cut()
        self._thinks, self._state = False, self._content
        return True

    def _tagged(self, final: bool) -> bool:
        """After <tool_call>."""
        self._skip()
        if self._rest[:1] == "{":
            return self._begin_json()
        return self._expect(final, {FUNCTION: self._function})

    def _skip(self, more: str = "") -> None:
        self._write(len(self._rest) - len(self._rest.lstrip(SPACE + more)))

    def _expect(self, final: bool, states: Mapping[str, Callable[[bool], bool]]) -> bool:
        """Go on by what comes next, or fail."""
        for mark, state in states.items():
            if self._rest.startswith(mark):
                self._write(len(mark))
                self._state = state
                return True
            if mark.startswith(self._rest) and not final:
                return False
        return self._failed() if self._rest else False

    def _failed(self, rest: int = 0) -> bool:
        self._fail(rest)
        self._state = self._content
        return True

    def _begin_json(self) -> bool:
        self._json, self._sent, self._value = JsonText(), 0, 0
        self._state = self._in_json
        return True

    def _in_json(self, final: bool) -> bool:
        self._write(self._json.feed(self._rest))
        if not self._read_json() or self._json.broken:
            return self._failed()
        if not self._json.done:
            return False
        self._finish()
        self._state = self._between if self._bare else self._called
        return True

    def _read_json(self) -> bool:
        """Name and arguments as far as they have come; False where they are none."""
        name = self._call.name if self._call is not None else self._read_name()
        if not name:
            return name is None and not self._json.done
        text = self._read_arguments()
        if text and self._call is None:
            self._name(name)
        self._arguments(text or "")
        return text is not None

    def _read_name(self) -> str | None:
        """The name, None where it has not come, "" where it is none."""
        found = self._json.members.get("name") or self._json.members.get("function")
        if found is None or found[1] < 0:
            return None
        name = json.loads(self._json.part(*found))
        known = isinstance(name, str) and (name in self._tools or not self._bare)
        return name if known else ""

    def _read_arguments(self) -> str | None:
        """What has come of the arguments since the last time; None where they are none."""
        found = self._json.members.get("arguments") or self._json.members.get("parameters")
        if found is None:
            return "{}" if self._json.done else ""
        start, end = found
        if self._json.part(start, start + 1) == "{":
            text = self._json.part(start + self._sent, end if end >= 0 else None)
        elif self._sent or end < 0:
            return ""
        else:
            text = _object(json.loads(self._json.part(start, end)))
        self._sent += len(text)
        return text or (None if not self._sent else "")

    def _called(self, final: bool) -> bool:
        """Behind a call: its end tag, if it has one."""
        rest = self._rest.lstrip(SPACE)
        if CALLED.startswith(rest) and rest != CALLED and not final:
            return False
        if rest.startswith(CALLED):
            self._read(len(self._rest) - len(rest) + len(CALLED))
        self._state = self._content
        return True

    def _between(self, final: bool) -> bool:
        """Behind a call that is bare JSON: another, or content."""
        rest = self._rest.lstrip(SPACE + ";,")
        if not rest and not final:
            return False
        if rest[:1] == "{":
            self._enter(len(self._rest) - len(rest))
            return self._begin_json()
        self._state = self._content
        return True

    def _python(self, final: bool) -> bool:
        """After <|python_tag|>: a call as JSON or as Python, or code."""
        self._skip()
        if self._rest[:1] == "{":
            return self._begin_json()
        if not final:
            return False
        text = self._rest
        call = _built_in(text)
        tool = next((name for name in _CODE if name in self._tools), None)
        if call is None and tool is not None and text:
            call = tool, {"code": text}
        if call is None:
            return self._failed(len(text)) if self._raw else False
        self._write(len(text))
        self._name(call[0])
        self._arguments(json.dumps(call[1], ensure_ascii=False))
        self._finish()
        self._state = self._content
        return True

    def _function(self, final: bool) -> bool:
        """After <function=: its name."""
        at = self._rest.find(">")
        name = self._rest[:at] if at >= 0 else self._rest
        if name and not _NAME.fullmatch(name):
            return self._failed()
        if at < 0:
            return False
        if not name:
            return self._failed()
        self._write(at + 1)
        self._name(name)
        self._parameters, self._state = 0, self._next_parameter
        return True

    def _next_parameter(self, final: bool) -> bool:
        self._skip()
        states = {PARAMETER: self._key, FUNCTION_END: self._function_end}
        return self._expect(final, states)

    def _function_end(self, final: bool) -> bool:
        self._arguments("}" if self._parameters else "{}")
        self._finish()
        self._state = self._called
        return True

    def _key(self, final: bool) -> bool:
        """After <parameter=: its name."""
        at = self._rest.find(">")
        if at < 0:
            return False
        self._parameter = self._rest[:at]
        self._write(at + 1)
        self._value, self._state = -1, self._in_value
        return True

    def _in_value(self, final: bool) -> bool:
        """The text of a parameter: streamed where it is text, else when it is complete."""
        if self._value < 0:  # one line break after the tag belongs to it
            if not self._rest:
                return False
            self._write(int(self._rest[0] == "\n"))
            self._value = 0
        assert self._call is not None
        schema = self._tools.get(self._call.name, {})
        at = self._rest.find(PARAMETER_END)
        before = (", " if self._parameters else "{") + json.dumps(self._parameter) + ": "
        text = self._rest[:at] if at >= 0 else self._rest
        kind = written(schema, self._parameter)
        if kind.text and at < 0:
            text = text[: len(text) - held(text, (f"\n{PARAMETER_END}", PARAMETER_END))]
            if text:
                self._arguments(("" if self._value else f'{before}"') + _inside(text))
                self._value += len(text)
                self._write(len(text))
            return False
        if at < 0:
            return False
        self._write(at + len(PARAMETER_END))
        text = text.removesuffix("\n")
        if kind.text:
            self._arguments(("" if self._value else f'{before}"') + _inside(text) + '"')
        else:
            self._arguments(before + kind.json(text))
        self._parameters += 1
        self._state = self._next_parameter
        return True


def _object(value: Any) -> str:
    """Arguments that are no object: as text within text, or none at all; "" for others."""
    if value is None:
        return "{}"
    inner = JsonText()
    fits = isinstance(value, str) and inner.feed(value) == len(value) and inner.done
    return value if fits else ""


def _inside(text: str) -> str:
    """Text inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _built_in(text: str) -> tuple[str, dict[str, Any]] | None:
    """The name and arguments of `name.call(key="value")`."""
    match = _BUILT_IN.fullmatch(text)
    if not match:
        return None
    try:
        call = ast.parse(f"f({match[2]})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        found = {k.arg or "": ast.literal_eval(k.value) for k in call.keywords}
        json.dumps(found)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
    return match[1], found
