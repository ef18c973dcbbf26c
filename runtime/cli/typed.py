"""Messages as a user types them: at a prompt, or as lines of a pipe.

A message is a line; one that begins with three quotes goes on to the next three, and one that
ends with a backslash goes on in the next line. Text pasted at a prompt is one message.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import click

from runtime.cli.output import is_terminal

_QUOTES = '"""'


class LeaveError(Exception):
    """Ctrl-C was pressed twice at the prompt."""


def messages(interactive: bool) -> Iterator[str]:
    """Each message, until the input ends. LeaveError after Ctrl-C twice in a row at a prompt."""
    read = _prompted() if interactive else _piped
    alone = False  # whether the last thing that came was a Ctrl-C
    while True:
        try:
            yield _message(read)
            alone = False
        except EOFError:
            return
        except KeyboardInterrupt:
            if alone or not interactive:
                raise LeaveError from None
            alone = True
            click.secho("\n(Ctrl-C again, Ctrl-D or /bye to leave)", err=True, dim=True)


def _message(read: Callable[[str], str]) -> str:
    """One message; EOFError when there is none. What was begun is a message at the end."""
    lines = [read("> ")]
    try:
        if lines[0].lstrip().startswith(_QUOTES):
            lines[0] = lines[0].lstrip()[len(_QUOTES) :]
            while not lines[-1].rstrip().endswith(_QUOTES):
                lines.append(read("... "))
            lines[-1] = lines[-1].rstrip()[: -len(_QUOTES)]
            return "\n".join(lines).strip("\n")
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(read("... "))
    except EOFError:
        pass
    return "\n".join(lines)


def _piped(prompt: str) -> str:
    line = b"" if sys.stdin is None else sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    return line.decode("utf-8", "replace").rstrip("\r\n")


def _prompted() -> Callable[[str], str]:
    """A reader of lines with editing and history, where the system has it."""
    with contextlib.suppress(ImportError):
        import readline

        if "libedit" not in (readline.__doc__ or ""):
            readline.parse_and_bind("set enable-bracketed-paste on")
    return _ask


def _ask(prompt: str) -> str:
    if is_terminal(sys.stdout):
        return input(prompt)
    # input() writes its prompt to stdout, which holds nothing but answers
    click.echo(prompt, nl=False, err=True)
    try:
        return input()
    except EOFError:
        click.echo(err=True)
        raise
