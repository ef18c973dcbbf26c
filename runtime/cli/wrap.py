"""Answers on a terminal: lines break between words, at the width the terminal has just then."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Callable

_LONG = 40  # columns: shorter words are never broken, longer ones only where they do not fit
_CLOSING = frozenset("、。，．！？：；）」』】》〉…ー")  # noqa: RUF001 (never first in a line)


def width(text: str) -> int:
    """Columns that `text` takes on a terminal."""
    return sum(_width(c) for c in text)


def _width(character: str) -> int:
    if unicodedata.east_asian_width(character) in ("W", "F"):
        return 2
    return 0 if unicodedata.category(character) in ("Mn", "Me", "Cf") else 1


class Wrapper:
    """Writes text that comes in pieces, and ends a line before a word that would not fit.

    A word is held back until it is whole only where it may reach the edge; blocks of code
    (between lines that begin with three backticks) keep their lines.
    """

    def __init__(
        self, write: Callable[[str], object], columns: Callable[[], int] | None = None
    ) -> None:
        """`write` takes what is ready to be shown; `columns` says how wide a line may be."""
        self._write = write
        self._columns = columns or (lambda: shutil.get_terminal_size().columns - 1)
        self._at = 0  # columns of the line that have been written
        self._gap = self._word = ""  # spaces, and the letters after them, not yet written
        self._begun = False  # whether the word's first letters have been written
        self._first = True  # whether the word is the line's first
        self._code = False

    def feed(self, text: str) -> None:
        """Take more text."""
        for character in text:
            self._take(character)
        near = self._at + width(self._gap + self._word) + _LONG >= self._columns()
        if self._word and not near and self._word not in ("`", "``"):
            self._emit(ends=False)

    def end(self) -> None:
        """Write what is still held back."""
        self._emit()
        self._write(self._gap)
        self._gap = ""

    def _take(self, character: str) -> None:
        if character == "\n":
            self._emit()
            self._write("\n")
            self._at, self._gap, self._first = 0, "", True
        elif character.isspace() and character != "\u00a0":
            self._emit()
            self._gap += " " if character == "\t" else character
        else:
            if unicodedata.category(character) == "Cc":
                character = "\ufffd"  # an answer shall not steer the terminal
            # East Asian text has no spaces: its lines may break around every character
            wide = _width(character) == 2 or _width((self._word or " ")[-1]) == 2
            if self._word and wide and character not in _CLOSING:
                self._emit()
            self._word += character

    def _emit(self, ends: bool = True) -> None:
        """Write the word; `ends` False when more of it may come."""
        if self._word:
            if self._first and self._word.startswith("```"):
                self._code = not self._code
            self._break_before()
            text, self._gap, self._word = self._gap + self._word, "", ""
            self._write(text)  # last: after Ctrl-C in it nothing is shown twice
            self._at += width(text)
            if self._at > self._columns():  # the terminal has gone on by itself
                self._at %= self._columns() + 1
            self._begun, self._first = True, False
        if ends:
            self._begun = False

    def _break_before(self) -> None:
        """End the line where the word would pass its edge and fits into a line of its own."""
        wide, columns = width(self._word), self._columns()
        past = self._at + width(self._gap) + wide > columns
        if past and self._at and not (self._begun or self._code):
            self._write("\n")
            self._at, self._gap = 0, ""
