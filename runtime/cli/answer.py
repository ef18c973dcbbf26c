"""One answer on the screen: progress of the prompt, the text as it comes, what it took."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import click

from runtime.cli.output import is_terminal, note
from runtime.cli.stats import Stopwatch
from runtime.cli.wrap import Wrapper

_PATIENCE = 0.4  # seconds before progress is shown: short prompts stay silent


class PromptProgress:
    """A line on a terminal's stderr while a prompt is read, gone before the answer begins."""

    def __init__(self, wanted: bool) -> None:
        dumb = os.environ.get("TERM") == "dumb"
        self._wanted = wanted and not dumb and is_terminal(sys.stderr)
        self._begun = time.monotonic()
        self._shown = False

    def report(self, done: int, total: int) -> None:
        """`done` of `total` tokens of the prompt have been read."""
        if not self._wanted or time.monotonic() - self._begun < _PATIENCE or done >= total:
            return
        self._shown = True
        _draw(f"\rreading the prompt: {done} of {total} tokens\x1b[K")

    def clear(self) -> None:
        """Take the line away."""
        if self._shown:
            self._shown = False
            _draw("\r\x1b[K")


class Screen:
    """Shows answers: wrapped on a terminal, as they are in a pipe."""

    def __init__(self, quiet: bool, timed: bool = True) -> None:
        self.quiet, self._timed = quiet, timed and not quiet
        self.watch = Stopwatch()

    def begin(self) -> dict[str, Callable[..., Any]]:
        """What `generate` and `chat` are to call for the next answer."""
        self.watch = Stopwatch()
        self._progress = PromptProgress(not self.quiet)

        def on_token(token: Any) -> None:
            if not self.watch.tokens:
                self._progress.clear()
            self.watch.on_token(token)

        return {"on_token": on_token, "on_prompt": self._progress.report}

    def show(self, answer: Iterable[str], pieces: list[str], before: str = "") -> bool:
        """Print `before` and the pieces of an answer, and keep those; False after Ctrl-C."""
        wrapper = Wrapper(_write) if is_terminal(sys.stdout) else None
        write = wrapper.feed if wrapper else _write
        if before:
            write(before)
        try:
            for piece in answer:
                pieces.append(piece)
                write(piece)
            whole = True
        except KeyboardInterrupt:
            whole = False
        finally:
            self._progress.clear()
        if wrapper:
            wrapper.end()
        click.echo()
        return whole

    def told(self, answer: Any, model: Any) -> None:
        """On stderr why an answer was cut, and how fast it was."""
        self.watch.prompt_tokens = answer.prompt_tokens
        self.watch.cached_tokens = answer.cached_tokens
        if answer.reason == "context":
            note(f"the answer was cut: the context of {model.context} tokens is full (-c sets it)")
        self.watch.speculation = answer.speculation
        note(self.watch.summary(), not self._timed or not self.watch.tokens)


def _draw(text: str) -> None:
    """Text that moves the cursor, which is wanted without colours too."""
    sys.stderr.write(text)
    sys.stderr.flush()


def _write(text: str) -> None:
    click.echo(text, nl=False)
