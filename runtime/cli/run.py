"""`runtime run`: answer a prompt, converse, or continue a text."""

from __future__ import annotations

from typing import Any

import click

from runtime.cli.answer import Screen
from runtime.cli.grammar_options import grammar_arguments, grammar_options
from runtime.cli.model_path import model_argument, model_option
from runtime.cli.options import (
    generation_arguments,
    model_options,
    sampling_options,
    speculation_options,
)  # fmt: skip
from runtime.cli.output import note
from runtime.cli.parsing import Command, option
from runtime.cli.prompt import at_terminal, given_prompt, given_system
from runtime.cli.session_file import SessionFile, settle
from runtime.cli.talk import SHOWN, TEXT, answer_once, converse, loaded_model, talk_options

OPENING = "Once upon a time"
_MOST = 256  # tokens of a text that is continued, which seldom ends by itself
USE = "How it is used"


@click.command(
    "run",
    cls=Command,
    epilog="""\b
Examples:
  runtime run                                   a story by the bundled model
  runtime run model.gguf                        talk with it (/? lists the commands)
  runtime run model.gguf -p "What is the capital of France?"
  runtime run model.gguf --raw -p "The capital of France is" -n 16 --temp 0
  echo "Translate to French: good morning" | runtime run model.gguf -q
""",
)
@click.argument("words", nargs=-1, metavar="[MODEL] [PROMPT]")
@option("-p --prompt", "The prompt; - reads stdin.", TEXT, metavar="TEXT")
@option("-f --file", "Read the prompt from FILE; - reads stdin.", TEXT, metavar="FILE")
@option("-e --escape", r"Read \n, \t, \" and the like in -p as one character.", TEXT, is_flag=True)
@option("--raw -no-cnv raw | --no-conversation",
        "Continue the prompt as it is, without the chat template.", USE, is_flag=True)  # fmt: skip
@option("-cnv --conversation converse | -i --interactive -if --interactive-first",
        "Converse; a prompt is the first message.", USE, is_flag=True)  # fmt: skip
@option("-st --single-turn single", "Leave after one answer.", USE, is_flag=True)
@option("--echo | --display-prompt", "Print the prompt before its continuation.", SHOWN,
        is_flag=True)  # fmt: skip
@talk_options
@sampling_options
@grammar_options
@model_option
@model_options
@speculation_options
def command(words: tuple[str, ...], model_option: str | None, **options: Any) -> None:
    """Answer a prompt through the model's chat template, or converse in a terminal.

    A file without a chat template continues the prompt, as --raw does with every file. Without
    a MODEL the bundled one is used; without a prompt it tells a story.
    """
    first, rest = (words[:1], words[1:]) if model_option is None else ((), words)
    model = model_argument(first[0] if first else None, model_option)
    prompt = given_prompt(options, rest, piped=not options["converse"])
    system = given_system(options)
    arguments = generation_arguments(options) | grammar_arguments(options)
    if options["raw"] and (options["converse"] or system):
        raise click.UsageError("--raw is no conversation: leave --conversation and --system out")
    if model is not None and prompt is None and not options["converse"] and not at_terminal():
        raise click.UsageError("there is no prompt: give one with -p TEXT")
    with loaded_model(model, options, arguments) as loaded:
        _use(loaded, model, prompt, system, arguments, options)


def _use(
    loaded: Any, model: str | None, prompt: str | None, system: str | None,
    arguments: dict[str, Any], options: dict[str, Any],
) -> None:  # fmt: skip
    """Converse, answer or continue, as the file and the options want it."""
    from runtime.cli.facts import has_chat_template

    quiet, has_template = options["quiet"], has_chat_template(loaded.file)
    file = options["session_file"]
    through = not options["raw"] and (has_template or options["converse"] or system is not None)
    if through and prompt is None and (model is not None or options["converse"]):
        converse(loaded, system, arguments, quiet, single=options["single"], file=file)
    elif through and options["converse"]:
        converse(loaded, system, arguments, quiet, prompt, options["single"], file)
    elif through and prompt is not None:
        note("answering through the chat template (--raw continues the text instead)", quiet)
        answer_once(loaded, prompt, system, arguments, quiet, file)
    else:
        note(_how(options["raw"], has_template, prompt is None), quiet)
        _continue(loaded, prompt, options["echo"], quiet, arguments, file)


def _how(raw: bool, has_template: bool, story: bool) -> str:
    if story:
        return "telling a story (runtime chat talks; runtime run FILE -p TEXT runs your model)"
    why = "--raw" if raw and has_template else "the file has no chat template"
    return f"continuing the text as it is ({why})"


def _continue(
    model: Any, prompt: str | None, echo: bool, quiet: bool, arguments: dict[str, Any],
    file: str | None,
) -> None:  # fmt: skip
    kept = None if file is None else SessionFile(model, file, False, quiet)
    session = model.session() if kept is None else kept.session
    if prompt is None and len(session):
        raise click.UsageError("there is nothing to go on with: give a text with -p TEXT")
    text = OPENING if prompt is None else prompt
    screen = Screen(quiet)
    options = {"max_tokens": _MOST, **arguments, **screen.begin()}
    ids = model.tokenizer.encode(text, add_special=not len(session))
    before = session.tokens
    answer = model.generate(ids, session=session, **options)
    if not text:
        note("the prompt is empty: the model begins a text of its own")
    shown = text if echo or prompt is None else ""
    whole = screen.show(answer, [], shown)
    screen.told(answer, model)
    if kept is not None:
        settle(session, [*before, *ids], answer)
        kept.save(session)
    if not whole:
        raise click.exceptions.Exit(130)
