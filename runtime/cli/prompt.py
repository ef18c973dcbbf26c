"""Where the text of a prompt comes from."""

from __future__ import annotations

import re
import select
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from runtime.cli.output import is_terminal, note
from runtime.cli.parsing import Refused

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "\\": "\\", '"': '"', "'": "'"}


def given_prompt(options: dict[str, Any], words: Sequence[str], piped: bool) -> str | None:
    """The prompt of --prompt, --file or the words after the model, or stdin's where `piped`.

    None when there is none. UsageError when it is given more than once.
    """
    prompt, file = options["prompt"], options["file"]
    if (prompt is not None) + (file is not None) + bool(words) > 1:
        raise click.UsageError("the prompt is given twice: use one of --prompt, --file and words")
    prompt = " ".join(words) if words else prompt
    if prompt == "-":
        return text_of("-")
    if file is not None:
        return text_of(file)
    if prompt is None and piped and not at_terminal():
        return text_of("-").strip("\n") or None
    return unescaped(prompt) if prompt is not None and options["escape"] else prompt


def given_system(options: dict[str, Any]) -> str | None:
    """The instructions of --system or --system-prompt-file."""
    text, file = options["system"], options["system_file"]
    if text is not None and file is not None:
        raise click.UsageError("give either --system or --system-prompt-file")
    return text_of(file).strip("\n") if file is not None else text


def at_terminal() -> bool:
    """Whether somebody types at stdin; without a stdin nobody does."""
    return is_terminal(sys.stdin)


def text_of(file: str) -> str:
    """A text file, whatever bytes are in it; - is stdin."""
    return bytes_of(file).decode("utf-8", "replace")


def bytes_of(file: str, most: int = -1) -> bytes:
    """A file, or its first `most` bytes; - is stdin."""
    if not file:
        raise Refused("the name of the text's file is empty")
    if file == "-":
        return _stdin(most)
    with Path(file).open("rb") as opened:
        return opened.read(most)


def unescaped(text: str) -> str:
    r"""`text` with \n, \t, \r, \0, \", \' and \\ replaced by what they stand for."""
    return re.sub(r"\\([ntr0\\\"'])", lambda found: _ESCAPES[found[1]], text)


def _stdin(most: int = -1) -> bytes:
    """All of stdin. Says so when nothing comes: a pipe left open looks like a hanging program."""
    if sys.stdin is None:
        return b""
    try:
        waiting = not select.select([sys.stdin], [], [], 1.0)[0]
    except (OSError, ValueError):  # not everything can be asked
        waiting = False
    if waiting:
        note("reading the prompt from stdin; -p TEXT gives one directly")
    return sys.stdin.buffer.read(most)
