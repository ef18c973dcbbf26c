"""A JSON object that arrives in pieces: where it ends, and whether it is any."""

from __future__ import annotations

import json
import re

_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')  # of a string
_WORDS = ("true", "false", "null")
_SPACE = " \t\n\r"
_DEEPEST = 512


class JsonText:
    """One JSON object. `length`: characters taken of it; `done`: it is complete; `broken`: what
    comes next does not belong to one.

    `members`: name -> [start, end] of the values of the outermost object; the end of one that is
    under way is -1.
    """

    def __init__(self) -> None:
        self._taken: list[str] = []
        self.done = self.broken = False
        self.members: dict[str, list[int]] = {}
        self._open = ""  # brackets that are to be closed
        self._state = "value"
        self._start = 0  # of the string, number or word under way
        self._left = 0  # hexadecimal digits of an escape that are missing
        self._is_key = False
        self._key: str | None = None  # of the outermost object, whose value is next or under way

    @property
    def length(self) -> int:
        """How many characters were taken."""
        return len(self._taken)

    def part(self, start: int = 0, end: int | None = None) -> str:
        """What was taken, from one place to another."""
        return "".join(self._taken[start:end])

    def feed(self, text: str) -> int:
        """Take characters up to the end of the object or what is wrong; how many."""
        at = 0
        while at < len(text) and not self.done:
            end = _PLAIN.match(text, at).end() if self._state == "string" else at  # type: ignore[union-attr]
            if end == at:
                if not self._step(text[at]):
                    self.broken = True
                    break
                end = at + 1
            self._taken += text[at:end]
            at = end
        return at

    def _step(self, c: str) -> bool:
        state = self._state
        if state == "string":
            return self._in_string(c)
        if state in ("escape", "hex"):
            return self._in_escape(c)
        if state == "scalar":
            if c.isalnum() or c in "+-.":
                return True
            if not self._end_scalar():
                return False
            state = self._state
        if c in _SPACE:
            return True
        if state in ("value", "first"):
            return self._begin(c)
        if state in ("key", "first key"):
            return self._begin_key(c)
        if state == "colon":
            self._state = "value"
            return c == ":"
        return self._after(c)

    def _begin(self, c: str) -> bool:
        if c == "]" and self._state == "first":
            return self._close("[")
        if not self._open and c != "{":
            return False
        if len(self._open) == 1 and self._key is not None:
            self.members[self._key] = [len(self._taken), -1]
        self._start = len(self._taken)
        if c in "{[":
            self._open += c
            self._state = "first key" if c == "{" else "first"
            return len(self._open) <= _DEEPEST
        self._is_key = False
        self._state = "string" if c == '"' else "scalar"
        return c == '"' or c == "-" or c.isalnum()

    def _begin_key(self, c: str) -> bool:
        if c == "}" and self._state == "first key":
            return self._close("{")
        self._state, self._is_key, self._start = "string", True, len(self._taken)
        return c == '"'

    def _in_string(self, c: str) -> bool:
        if c == "\\":
            self._state = "escape"
        elif c == '"':
            self._end_string()
        return c >= " "

    def _in_escape(self, c: str) -> bool:
        if self._state == "hex":
            self._left -= 1
            self._state = "hex" if self._left else "string"
            return c in "0123456789abcdefABCDEF"
        self._state, self._left = ("hex", 4) if c == "u" else ("string", 0)
        return c in '"\\/bfnrtu'

    def _end_string(self) -> None:
        if not self._is_key:
            self._ended(1)
            return
        self._state = "colon"
        if len(self._open) == 1:
            self._key = json.loads(self.part(self._start) + '"')

    def _end_scalar(self) -> bool:
        text = self.part(self._start)
        if text not in _WORDS and not _NUMBER.fullmatch(text):
            return False
        self._ended(0)
        return True

    def _after(self, c: str) -> bool:
        """What may follow a value in brackets."""
        if c == ",":
            self._state = "key" if self._open[-1] == "{" else "value"
            return True
        return c in "}]" and self._close("{" if c == "}" else "[")

    def _close(self, bracket: str) -> bool:
        if self._open[-1:] != bracket:
            return False
        self._open = self._open[:-1]
        self._ended(1)
        return True

    def _ended(self, more: int) -> None:
        """A value ends with this character (1) or before it (0)."""
        self._state = "after"
        if len(self._open) == 1 and self._key is not None:
            self.members[self._key][1] = len(self._taken) + more
            self._key = None
        self.done = not self._open
