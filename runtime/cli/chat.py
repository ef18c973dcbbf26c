"""`runtime chat`: talk with a model, in a terminal or through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import click

from runtime.cli.options import (
    generation_arguments,
    load_arguments,
    model_options,
    sampling_options,
)
from runtime.cli.output import note
from runtime.cli.stats import Stopwatch

_HELP = """/clear   forget the conversation
/help    this list
/exit    leave (or Ctrl-D); Ctrl-C stops an answer"""


@click.command(
    "chat",
    epilog="""\b
Examples:
  runtime chat
  runtime chat model.gguf --system "Answer in one sentence."
  printf 'What is a fox?\\nAnd a hen?\\n' | runtime chat model.gguf -q
""",
)
@click.argument("model", required=False, type=click.Path())
@click.option("--system", metavar="TEXT", help="Instructions that come before the conversation.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no timings.")
@sampling_options(max_tokens=1024)
@model_options
def command(model: str | None, system: str | None, quiet: bool, **options: Any) -> None:
    """Talk with a model through its chat template.

    Each line is a message. The conversation stays in the model's memory: only new words are
    read. When the context is full the oldest messages are forgotten. In a pipe every line of
    stdin is answered in turn.
    """
    import runtime

    arguments = generation_arguments(options)
    loaded = runtime.load(model, **load_arguments(options, quiet))
    try:
        conversation = Conversation(loaded, system, arguments, quiet)
        if not quiet and _interactive():
            note(f"{_title(loaded)} · /help for commands, /exit to leave")
        for line in _lines():
            if not conversation.handle(line):
                break
    finally:
        loaded.close()


class Conversation:
    """Messages so far and the session that remembers them."""

    def __init__(
        self, model: Any, system: str | None, arguments: dict[str, Any], quiet: bool
    ) -> None:
        self._model = model
        self._system = [{"role": "system", "content": system}] if system else []
        self._arguments = arguments
        self._quiet = quiet
        self.clear()

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages: list[dict[str, str]] = list(self._system)
        self._session = self._model.session()

    def handle(self, line: str) -> bool:
        """Do what a line says; False to leave."""
        text = line.strip()
        if text in ("/exit", "/quit"):
            return False
        if text == "/clear":
            self._session.close()
            self.clear()
            note("forgotten", self._quiet)
        elif text == "/help":
            note(_HELP)
        elif text.startswith("/") and text[1:].isalpha():
            note(f"no command {text}\n{_HELP}")
        elif text:
            self.answer(text)
        return True

    def answer(self, text: str) -> None:
        """Print the answer to a message. A failed message is taken back."""
        from runtime.errors import Error

        kept = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            self._generate()
        except Error as error:
            self.messages = kept
            if not _interactive():
                raise
            note(f"error: {error}")

    def _begin(self, on_token: Any) -> Any:
        """The answer to the messages, the oldest turns forgotten until there is room for it."""
        from runtime.errors import MemoryLimitError

        most, context = self._arguments["max_tokens"], self._model.context
        room = context // 4 if most < 0 else min(most, context // 4)
        forgotten = 0
        while True:
            try:
                answer = self._model.chat(
                    self.messages, session=self._session, room=room, on_token=on_token,
                    **self._arguments,
                )  # fmt: skip
                break
            except MemoryLimitError:
                dropped = self._forget_oldest()
                forgotten += dropped
                if not dropped and not room:
                    raise
                room = room if dropped else 0
        if forgotten:
            plural = "s are" if forgotten > 1 else " is"
            note(f"the context is full: the oldest {forgotten} message{plural} forgotten")
        return answer

    def _forget_oldest(self) -> int:
        """Drop the oldest message and its answer; how many messages went. The last one stays."""
        start = len(self._system)
        users = [i for i, m in enumerate(self.messages) if m["role"] == "user" and i > start]
        if not users:
            return 0
        del self.messages[start : users[0]]
        return users[0] - start

    def _generate(self) -> None:
        watch, pieces, stopped = Stopwatch(), [], False
        answer = self._begin(watch.on_token)
        try:
            for piece in answer:
                pieces.append(piece)
                click.echo(piece, nl=False)
        except KeyboardInterrupt:
            stopped = True
        click.echo()
        watch.prompt_tokens = answer.prompt_tokens
        if answer.reason == "context":
            note(f"the answer was cut: the context of {self._model.context} tokens is full")
        if pieces or not stopped:
            self.messages.append({"role": "assistant", "content": "".join(pieces)})
        else:
            self.messages.pop()
        note(watch.summary(), self._quiet or not _interactive())
        if stopped and not _interactive():
            raise click.exceptions.Exit(130)


def _title(model: Any) -> str:
    from runtime.cli.facts import model_name, model_type

    return f"{model_name(model.file)} ({model_type(model.file)})"


def _interactive() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def _lines() -> Iterator[str]:
    """Messages as they come: typed at a prompt, or lines of a pipe."""
    if not _interactive():
        for line in sys.stdin.buffer:
            yield line.decode("utf-8", "replace")
        return
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (editing and history of input())
    while True:
        # input() writes its prompt to stdout, which holds nothing but answers
        on_stderr = not sys.stdout.isatty()
        click.echo("> " if on_stderr else "", nl=False, err=True)
        try:
            yield input("" if on_stderr else "> ")
        except EOFError:
            click.echo(err=True)
            return
