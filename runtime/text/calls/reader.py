"""What every form of answers has in common: pieces in, content, reasoning and calls out."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from runtime.text.calls.delta import Call, CallPart, Delta

SPACE = " \t\r\n"


class Flow:
    """Text to show, without the white space around what is taken out of it."""

    def __init__(self, fresh: bool = False) -> None:
        """fresh: white space at its beginning is dropped, too."""
        self._fresh = fresh
        self.gap = ""  # white space that is shown only if text follows
        self.empty = True

    def take(self, text: str) -> str:
        """What can be shown now."""
        text = self.gap + text
        body = text.rstrip(SPACE)
        self.gap = text[len(body) :]
        if body and self._fresh:
            body, self._fresh = body.lstrip(SPACE), False
        self.empty = self.empty and not body
        return body

    def end(self) -> str:
        """It ends here; the white space at its end, to be shown or dropped."""
        gap, self.gap = "" if self._fresh else self.gap, ""
        return gap

    def cut(self) -> None:
        """Something else stands here: white space before and behind it is dropped."""
        self.gap, self._fresh = "", True


class Reader:
    """One answer, fed with pieces of its text; how it is cut into pieces makes no difference.

    A call that is none comes as content, as it was written: what is streamed of it as a call, and
    in `message` all of it. `calls` are the whole ones.
    """

    def __init__(
        self, tools: Mapping[str, Mapping[str, Any]] | None = None,
        new_id: Callable[[], str] | None = None,
    ) -> None:  # fmt: skip
        """tools: name -> JSON schema of the parameters; without, there are no calls."""
        self._tools = dict(tools or {})
        self._new_id = new_id or (lambda: f"call_{secrets.token_hex(12)}")
        self._rest = ""  # not read yet
        self._out: list[Delta] = []
        self._state: Callable[[bool], bool] = self._content
        self._content_flow, self._reasoning_flow = Flow(), Flow(fresh=True)
        self._said, self._thought = list[str](), list[str]()
        self._raw = list[str]()  # how the call under way is written
        self._call: CallPart | None = None  # once it is known, with which it began
        self._given = list[str]()  # its arguments
        self.calls: list[Call] = []

    def feed(self, text: str) -> list[Delta]:
        """What can be told of the answer now that `text` has come."""
        self._rest += text
        while self._state(False):
            pass
        return self._told()

    def close(self) -> list[Delta]:
        """What was held back: the answer is over."""
        while self._state(True):
            pass
        if self._raw:
            self._fail(len(self._rest))
        gap = self._content_flow.end()
        self._show("" if self.calls else gap)
        return self._told()

    @property
    def message(self) -> dict[str, Any]:
        """The answer so far as a message of OpenAI's interface."""
        content = "".join(self._said)
        found: dict[str, Any] = {"role": "assistant", "content": content}
        if self._thought:
            found["reasoning_content"] = "".join(self._thought)
        if self.calls:
            found["content"] = content or None
            found["tool_calls"] = [
                {"id": c.id, "type": "function",
                 "function": {"name": c.name, "arguments": c.arguments}}
                for c in self.calls
            ]  # fmt: skip
        return found

    def _told(self) -> list[Delta]:
        found, self._out = self._out, []
        return found

    def _content(self, final: bool) -> bool:
        """The state outside everything else; whether to go on at once."""
        self._say(self._read(len(self._rest)))
        return False

    def _read(self, length: int) -> str:
        """So much of what has come, which is then read."""
        found, self._rest = self._rest[:length], self._rest[length:]
        return found

    def _write(self, length: int) -> None:
        """So much belongs to the call under way."""
        if length:
            self._raw.append(self._read(length))

    def _say(self, text: str) -> None:
        self._show(self._content_flow.take(text))

    def _show(self, text: str, instead: str | None = None) -> None:
        """instead: what the message has for it."""
        if text:
            self._out.append(Delta(content=text))
        if text or instead:
            self._said.append(text if instead is None else instead)

    def _think(self, text: str) -> None:
        text = self._reasoning_flow.take(text)
        if text:
            self._thought.append(text)
            self._out.append(Delta(reasoning=text))

    def _enter(self, mark: int) -> None:
        """A call begins with a mark of so many characters."""
        self._raw, self._content_flow.gap = [self._content_flow.gap], ""
        self._write(mark)

    def _name(self, name: str) -> None:
        """The name of the call under way is known."""
        self._call = CallPart(len(self.calls), self._new_id(), name, "")
        self._out.append(Delta(call=self._call))

    def _arguments(self, text: str) -> None:
        """More of its arguments."""
        if text:
            self._given.append(text)
            self._out.append(Delta(call=CallPart(len(self.calls), "", "", text)))

    def _finish(self) -> None:
        """It is complete."""
        assert self._call is not None
        self.calls.append(Call(self._call.id, self._call.name, "".join(self._given)))
        self._forget()
        self._content_flow.cut()

    def _fail(self, rest: int = 0) -> None:
        """It is none: content, with so many more characters."""
        last = self._read(rest)
        raw, shown = "".join(self._raw) + last, self._call is not None
        self._forget()
        self._content_flow.empty = False
        self._show(last if shown else raw, raw)

    def _forget(self) -> None:
        self._call, self._raw, self._given = None, [], []


def held(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of `text` may begin one of `marks`."""
    longest = min(len(text), max(map(len, marks), default=1) - 1)
    for n in range(longest, 0, -1):
        if any(mark.startswith(text[-n:]) for mark in marks):
            return n
    return 0


def first(text: str, marks: Sequence[str]) -> tuple[int, str] | None:
    """Where the first of `marks` stands, and which."""
    found = [(at, mark) for mark in marks if (at := text.find(mark)) >= 0]
    return min(found, default=None)
