"""Errors a person can act on: every message names what is wrong and what to do."""

from typing import Any


def shown(value: Any, most: int = 60) -> str:
    """A value for an error text: its repr in one line, not too long, whatever it is."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a repr of somebody else's, or an int too long to print
        return f"<{type(value).__name__}>"
    return text if len(text) <= most else text[: most - 3] + "..."


class Error(Exception):
    """Base of all errors this package raises on purpose, of one line each.

    What a message quotes (a file's name, a text of its metadata) may hold line breaks: they
    become spaces.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(" ".join(message.splitlines()))


class OpError(Error, ValueError):
    """An op was given shapes, types or attributes it cannot take."""


class FileError(Error, ValueError):
    """A model file is damaged, truncated, or not what it claims to be."""


class ModelError(Error, ValueError):
    """A model needs something this package does not have, or contradicts itself."""


class TextError(Error, ValueError):
    """A vocabulary, chat template or sampling option cannot be used."""


class MemoryLimitError(Error, ValueError):
    """A context, batch or cache does not fit."""


class BackendError(Error, RuntimeError):
    """A device, kernel or instruction set is missing or failed."""


class OptionError(Error, ValueError):
    """An option or environment variable has a value that cannot be used."""
