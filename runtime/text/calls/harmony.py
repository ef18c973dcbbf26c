"""Answers in channels, as gpt-oss writes them: analysis, commentary, final, and calls to=name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from runtime.text.calls.json_text import JsonText
from runtime.text.calls.reader import Reader, first, held

START, CHANNEL, MESSAGE, END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
CALLED, RETURN, CONSTRAIN = "<|call|>", "<|return|>", "<|constrain|>"

_MARKS = (END, CALLED, RETURN, START, CHANNEL)
_TO = re.compile(r"\bto=([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_LONGEST = 300  # characters of a header
_SURE = 20  # characters that tell whether it is one
_BEGINS = re.compile(r"\s{0,4}(<\|start\|>|<\|channel\|>|<\|constrain\|>|assistant\b|to=)")


class HarmonyReader(Reader):
    """Of a prompt that ends with <|start|>assistant."""

    def __init__(
        self, tools: Mapping[str, Mapping[str, Any]] | None = None,
        new_id: Callable[[], str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(tools, new_id)
        self._state = self._header
        self._json = JsonText()

    def _header(self, final: bool) -> bool:
        """Up to <|message|>: which channel, and to whom."""
        at = self._rest.find(MESSAGE)
        text = self._rest[: at if at >= 0 else None]
        like = _BEGINS.match(text) is not None
        if at < 0 and not final and len(text) < (_LONGEST if like else _SURE):
            return False
        if at < 0 or not like:
            mark = next((m for m in _MARKS if text.startswith(m)), "")
            self._say(self._read(len(text) if final and at < 0 else len(mark)))
            self._state = self._plain
            return bool(self._rest)
        channel, to = _CHANNEL.search(text), _TO.search(text)
        if to is not None:
            self._enter(at + len(MESSAGE))
            self._json = JsonText()
            self._name(to[1].removeprefix("functions."))
            self._state = self._in_call
            return True
        self._read(at + len(MESSAGE))
        self._state = self._plain
        if channel is not None and channel[1] == "analysis":
            if self._thought:
                self._reasoning_flow.gap = "\n\n"
            self._state = self._analysis
        elif not self._content_flow.empty:
            self._content_flow.gap = "\n\n"
        return True

    def _plain(self, final: bool) -> bool:
        return self._text(final, self._say)

    def _analysis(self, final: bool) -> bool:
        return self._text(final, self._think)

    def _text(self, final: bool, take: Callable[[str], None]) -> bool:
        found = first(self._rest, _MARKS)
        if found is None:
            take(self._read(len(self._rest) - (0 if final else held(self._rest, _MARKS))))
            return False
        take(self._read(found[0]))
        self._end(found[1])
        return True

    def _end(self, mark: str) -> None:
        """A message ends; a header follows, which the mark may begin."""
        if mark not in (START, CHANNEL):
            self._read(len(mark))
        self._state = self._header

    def _in_call(self, final: bool) -> bool:
        """The arguments of a call: JSON, up to the end of the message."""
        taken = self._json.feed(self._rest)
        self._arguments(self._rest[:taken])
        self._write(taken)
        if self._json.broken:
            self._fail()
        elif self._json.done:
            self._finish()
        else:
            return False
        self._state = self._plain
        return True
