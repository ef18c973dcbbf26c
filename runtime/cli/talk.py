"""What `run` and `chat` share: options, the loaded model, and the conversation itself."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from runtime.cli.answer import Screen
from runtime.cli.model_path import load
from runtime.cli.options import asked_by_file, cache_arguments, cache_options, load_arguments
from runtime.cli.output import note
from runtime.cli.parsing import F, decorated, option
from runtime.cli.prompt import at_terminal
from runtime.cli.session_file import SessionFile

TEXT, SHOWN = "Prompt", "What is printed"

_OPTIONS = (
    option("-sys --system system | --system-prompt", "Instructions before the conversation.", TEXT,
           metavar="TEXT"),
    option("-sysf --system-prompt-file system_file", "Read the instructions from FILE.", TEXT,
           metavar="FILE"),
    option("--session session_file", "Go on from FILE, and keep what is said in it for the next "
           "start, which reads none of it again.", TEXT, metavar="FILE"),
    option("-q --quiet", "No progress and no timings.", SHOWN, is_flag=True),
    option("-v --verbose", "A line for every plan that is made, as with DEBUG=1.", SHOWN,
           is_flag=True),
    option("-co --color", "Colours; auto: on a terminal.", SHOWN, bare="on",
           type=click.Choice(["on", "off", "auto"]), default="auto", metavar="[on|off|auto]"),
)  # fmt: skip


def talk_options(function: F) -> F:
    """--system, --session, --quiet, --verbose, --color, --cache-ram and --no-prompt-cache."""
    return decorated(cache_options(function), _OPTIONS)


@contextmanager
def loaded_model(
    path: str | None, options: dict[str, Any], arguments: dict[str, Any]
) -> Iterator[Any]:
    """The model of `path`, closed at the end; what -v and --color ask for holds from here on.

    arguments: of the generation; what else the model's file asks for is told.
    """
    if options["verbose"]:
        os.environ["DEBUG"] = os.environ.get("DEBUG") or "1"
    if options["color"] != "auto":
        click.get_current_context().color = options["color"] == "on"
    started = time.perf_counter()
    loaded = load(path, **load_arguments(options, options["quiet"]), **cache_arguments(options))
    try:
        note(f"loaded in {time.perf_counter() - started:.2f} s", options["quiet"])
        asked = asked_by_file(loaded.file.metadata, arguments)
        note(f"the file asks for {asked}", options["quiet"] or not asked)
        yield loaded
    finally:
        loaded.close()


def converse(
    model: Any, system: str | None, arguments: dict[str, Any], quiet: bool,
    first: str | None = None, single: bool = False, file: str | None = None,
) -> None:  # fmt: skip
    """Answer messages until the user leaves: typed at a terminal, or each line of a pipe.

    first: a message to begin with; single: leave after the first answer. file: of --session.
    """
    from runtime.cli.conversation import Conversation

    interactive = at_terminal()
    screen = Screen(quiet, timed=interactive)
    kept = None if file is None else SessionFile(model, file, True, quiet)
    if interactive and not quiet:
        note(f"{title(model)} · /? for help, /bye to leave")
    with Conversation(model, system, arguments, screen, interactive, kept) as conversation:
        _converse(conversation, interactive, first, single)


def _converse(conversation: Any, interactive: bool, first: str | None, single: bool) -> None:
    from runtime.cli import typed

    if first:
        conversation.answer(first)
        if single:
            return
    try:
        for line in typed.messages(interactive):
            if not _handled(conversation, line, interactive) or single:
                return
    except typed.LeaveError:
        raise click.exceptions.Exit(130) from None


def answer_once(
    model: Any, text: str, system: str | None, arguments: dict[str, Any], quiet: bool,
    file: str | None = None,
) -> None:  # fmt: skip
    """Print the answer to one message; what goes wrong ends the program. file: of --session."""
    from runtime.cli.conversation import Conversation

    kept = None if file is None else SessionFile(model, file, True, quiet)
    with Conversation(model, system, arguments, Screen(quiet), False, kept) as conversation:
        conversation.answer(text)


def title(model: Any) -> str:
    """A model's name and type, and whether ChatML stands in for its template."""
    from runtime.cli.facts import has_chat_template, model_name, model_type

    stands_in = "" if has_chat_template(model.file) else " · no chat template: ChatML stands in"
    return f"{model_name(model.file)} ({model_type(model.file)}){stands_in}"


def _handled(conversation: Any, line: str, interactive: bool) -> bool:
    try:
        return conversation.handle(line)
    except KeyboardInterrupt:  # beside an answer, which takes its own
        if not interactive:
            raise
        return True
