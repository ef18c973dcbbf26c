"""`runtime chat`: talk with a model, in a terminal or through a pipe."""

from __future__ import annotations

from typing import Any

import click

from runtime.cli.grammar_options import grammar_arguments, grammar_options
from runtime.cli.model_path import model_argument, model_option
from runtime.cli.options import (
    generation_arguments,
    model_options,
    sampling_options,
    speculation_options,
)  # fmt: skip
from runtime.cli.parsing import Command, option
from runtime.cli.prompt import given_system
from runtime.cli.talk import TEXT, converse, loaded_model, talk_options


@click.command(
    "chat",
    cls=Command,
    epilog="""\b
Examples:
  runtime chat
  runtime chat model.gguf --system "Answer in one sentence."
  printf 'What is a fox?\\nAnd a hen?\\n' | runtime chat model.gguf -q
""",
)
@click.argument("words", nargs=-1, metavar="[MODEL]")
@option("-p --prompt", "The first message.", TEXT, metavar="TEXT")
@talk_options
@sampling_options
@grammar_options
@model_option
@model_options
@speculation_options
def command(words: tuple[str, ...], model_option: str | None, **options: Any) -> None:
    """Talk with a model through its chat template.

    The conversation stays in the model's memory: only new words are read. When the context is
    full the oldest messages are forgotten. In a pipe every line of stdin is answered in turn.
    """
    if len(words) > 1:
        raise click.UsageError(f"unexpected {words[1]!r}: the first message goes after -p")
    path = model_argument(words[0] if words else None, model_option)
    system = given_system(options)
    arguments = generation_arguments(options) | grammar_arguments(options)
    with loaded_model(path, options, arguments) as loaded:
        converse(loaded, system, arguments, options["quiet"], options["prompt"],
                 file=options["session_file"])  # fmt: skip
