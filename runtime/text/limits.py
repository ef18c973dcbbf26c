"""What one rendering of a chat template may use: time, and text made along the way.

A template comes from a model's file, which may be damaged or hostile. Python cannot be stopped
from outside, so the sandbox asks here before everything that takes time or makes something big:
each turn of a loop, each call, each piece of text. `Budget` counts; `size_of` and `growth` say
beforehand how big a value is and would become.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Any

SECONDS = 5.0
TEXT = 16 << 20  # characters of one text
MADE = 64 << 20  # characters made in one rendering, beside MADE_PER_GIVEN for each one given
MADE_PER_GIVEN = 64
_DEPTH = 200  # of lists in lists: hashing and comparing deeper ones can exhaust the C stack
_ITEMS = 300_000
_PIECES = 5_000_000  # of a text that is split
_BITS = 100_000  # of a whole number
_WIDTH = 10_000  # of padding and indentation
_SLOW_TEXT = 1 << 20  # characters, for filters that take a microsecond for each


class LimitError(Exception):
    """A template wants more than a rendering may use."""


class Budget:
    """What is left to one rendering; `given` is the size of its messages in characters."""

    def __init__(self, given: int = 0):
        self._end = time.perf_counter() + SECONDS
        self._left = MADE + MADE_PER_GIVEN * given

    def spend(self, characters: int = 0) -> None:
        """Count text that was made or is about to be, and look at the clock.

        Raises LimitError when either is used up.
        """
        self._left -= characters
        if self._left < 0 or characters > TEXT:
            raise LimitError("it makes too much text")
        if time.perf_counter() > self._end:
            raise LimitError(f"it takes longer than {SECONDS:g} seconds")


def size_of(value: Any) -> int:
    """How many characters `value` has, or would have when written out as text.

    Raises LimitError for what is too big or nested too deep to be written, hashed or compared.
    """
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, int):
        return _bits(value) // 3 + 1
    if isinstance(value, dict | list | tuple):
        return _size_of_items(value)
    return 16


def _size_of_items(value: Any) -> int:
    size = items = 0
    rest = [(value, 1)]
    while rest:
        value, depth = rest.pop()
        items += 1
        size += 1 + depth  # a comma, and indentation by one
        if depth > _DEPTH or items > _ITEMS:
            raise LimitError("lists are too big or too deep to be written")
        if isinstance(value, dict):
            rest += ((item, depth + 1) for pair in value.items() for item in pair)
        elif isinstance(value, list | tuple):
            rest += ((item, depth + 1) for item in value)
        else:
            size += size_of(value)
    return size


def _bits(value: int) -> int:
    bits = value.bit_length()
    if bits > _BITS:
        raise LimitError(f"it makes a number of {bits} bits")
    return bits


def operator_size(operator: str, left: Any, right: Any) -> int:
    """The size of the result of an operator, an upper bound. Raises LimitError as `size_of`."""
    numbers = isinstance(left, int | float) and isinstance(right, int | float)
    if operator == "**":
        if isinstance(left, int) and isinstance(right, int) and right > 0:
            _check(left.bit_length() * right, _BITS, "a number")
        return 16
    if operator == "%" and isinstance(left, str | bytes):
        return _formatted(left, (right,))
    if numbers:
        return size_of(left) + size_of(right)
    if operator == "*":
        for text, times in ((left, right), (right, left)):
            if isinstance(text, str | bytes | list | tuple) and isinstance(times, int):
                return _check(len(text) * max(0, times), TEXT, "a text or list")
    return _length(left) + _length(right)


def growth(name: str, value: Any, arguments: tuple[Any, ...]) -> int:
    """The size of what the filter or method called `name` makes of `value`, an upper bound.

    Raises LimitError for what no template needs.
    """
    rule = _GROWTH.get(name)
    return rule(value, arguments) if rule else 0


def _check(size: int, most: int, what: str) -> int:
    if size > most:
        raise LimitError(f"it makes {what} of size {size}")
    return size


def _length(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else size_of(value)


def _numbers(value: Any, arguments: tuple[Any, ...]) -> int:
    """Numbers that say how wide, deep or often have to be small; they count for each line."""
    widest = 0
    for number in arguments:
        if isinstance(number, str):
            widest += len(number)
        elif isinstance(number, int | float):
            widest += _check(abs(int(number)), _WIDTH, "padding")
    lines = value.count("\n") + value.count("\t") + 1 if isinstance(value, str) else 1
    return _check(_length(value) + lines * widest, TEXT, "a text")


def _replaced(value: Any, arguments: tuple[Any, ...]) -> int:
    texts = [a if isinstance(a, str) else str(a) for a in (value, *arguments[:2])]
    if len(texts) < 3:
        return 0
    text, old, new = texts
    return _check(len(text) + text.count(old) * len(new), TEXT, "a text")


def _joined(value: Any, arguments: tuple[Any, ...]) -> int:
    """`value` and `arguments` are parts and what goes between them, in either order."""
    given = [a for a in (value, *arguments) if isinstance(a, str | list | tuple)]
    parts = max(given, key=lambda a: (not isinstance(a, str), len(a)), default="")
    between = sum(len(a) for a in given if a is not parts and isinstance(a, str))
    return _check(size_of(parts) + len(parts) * between, TEXT, "a text")


_WIDE = re.compile(r"%[^a-zA-Z%]*(?:\*|\d{5})|\{[^{}]*(?:\{|\d{5})")
_TWICE = re.compile(r"%\(|\{\w")


def _formatted(value: Any, arguments: tuple[Any, ...]) -> int:
    """A format may ask for any width, in itself or (%*d, {:{}}) by an argument."""
    text = value if isinstance(value, str) else str(value)
    if _WIDE.search(text):
        raise LimitError("it formats with a width that is huge or computed")
    fields = text.count("{") + text.count("%")
    uses = fields if _TWICE.search(text) else 1
    return _check(len(text) + uses * size_of(arguments) + fields * _WIDTH, TEXT, "a text")


def _json(value: Any, arguments: tuple[Any, ...]) -> int:
    widths = (a for a in arguments if isinstance(a, int | str | list | tuple))
    width = sum(_check(abs(a) if isinstance(a, int) else size_of(a), 64, "JSON") for a in widths)
    return _check(size_of(value) * (1 + width), 4 * TEXT, "JSON")


def _slow(value: Any, arguments: tuple[Any, ...]) -> int:
    size = _numbers(value, arguments)
    texts = sum(len(a) for a in arguments if isinstance(a, str))
    return _check(size * (1 + texts), _SLOW_TEXT, "a text for a slow filter")


def _split(value: Any, arguments: tuple[Any, ...]) -> int:
    separator = next((a for a in arguments if isinstance(a, str) and a), None)
    pieces = value.count(separator) if separator and isinstance(value, str) else len(value) // 2
    return _check(pieces, _PIECES, "a list")


def _translated(value: Any, arguments: tuple[Any, ...]) -> int:
    tables = [a for a in arguments if isinstance(a, dict)]
    longest = max((_length(item) for table in tables for item in table.values()), default=1)
    return _check(len(value) * longest, TEXT, "a text")


def _summed(value: Any, arguments: tuple[Any, ...]) -> int:
    """Adding lists one by one copies the sum each time."""
    items = value if isinstance(value, list | tuple) else ()
    return _check(len(items) * sum(_length(item) for item in items), 64 * TEXT, "lists")


_Rule = Callable[[Any, tuple[Any, ...]], int]
_GROWTH: Mapping[str, _Rule] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "expandtabs", "indent"), _numbers),
    **dict.fromkeys(("batch", "slice", "round", "to_bytes"), _numbers),
    **dict.fromkeys(("wordwrap", "urlize", "striptags", "pprint", "xmlattr"), _slow),
    **dict.fromkeys(("format", "format_map"), _formatted),
    "replace": _replaced,
    "join": _joined,
    "sum": _summed,
    "tojson": _json,
    "translate": _translated,
    **dict.fromkeys(("split", "rsplit", "splitlines"), _split),
    "strftime": _formatted,
}
