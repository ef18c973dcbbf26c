"""`runtime run`: continue a text."""

from __future__ import annotations

import select
import sys
import time
from pathlib import Path
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

OPENING = "Once upon a time"


@click.command(
    "run",
    epilog="""\b
Examples:
  runtime run                                   a story by the bundled model
  runtime run model.gguf -p "The capital of France is" -n 16 --temp 0
  runtime run model.gguf -f notes.txt --stop "###" > answer.txt
  echo "Dear Sir" | runtime run model.gguf -q
""",
)
@click.argument("model", required=False, type=click.Path())
@click.option("-p", "--prompt", metavar="TEXT", help="The text to continue; - reads stdin.")
@click.option("-f", "--file", metavar="FILE", help="Read the text from FILE; - reads stdin.")
@click.option("--echo", is_flag=True, help="Print the prompt before its continuation.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no timings.")
@sampling_options(max_tokens=256)
@model_options
def command(
    model: str | None, prompt: str | None, file: str | None, echo: bool, quiet: bool, **options: Any
) -> None:
    """Continue a text, token by token, exactly as the model would.

    The prompt is sent as it is; for models that expect messages use `runtime chat`. Without
    a MODEL the bundled one is used, without a prompt it begins a story.
    """
    if prompt is not None and file is not None:
        raise click.UsageError("give either --prompt or --file")
    text = _prompt(prompt, file)
    arguments = generation_arguments(options)
    started = time.perf_counter()

    import runtime

    loaded = runtime.load(model, **load_arguments(options, quiet))
    try:
        note(f"loaded in {time.perf_counter() - started:.2f} s", quiet)
        story = text is None
        _continue(loaded, OPENING if text is None else text, echo or story, quiet, arguments)
    finally:
        loaded.close()


def _continue(model: Any, text: str, echo: bool, quiet: bool, arguments: dict[str, Any]) -> None:
    ids = model.tokenizer.encode(text)
    watch = Stopwatch(len(ids))
    answer = model.generate(ids, on_token=watch.on_token, **arguments)
    if not text:
        note("the prompt is empty: the model begins a text of its own")
    if echo:
        click.echo(text, nl=False)
    stopped = False
    try:
        for piece in answer:
            click.echo(piece, nl=False)
    except KeyboardInterrupt:
        stopped = True
    click.echo()
    if answer.reason == "context":
        note(f"stopped: the context of {model.context} tokens is full (-c sets it)")
    note(watch.summary(), quiet)
    if stopped:
        raise click.exceptions.Exit(130)


def _prompt(prompt: str | None, file: str | None) -> str | None:
    """The text asked for; None when nothing was given."""
    source = file if file is not None else prompt
    if source == "-":
        return _stdin()
    if file is not None:
        return Path(file).read_bytes().decode("utf-8", "replace")
    if prompt is None and sys.stdin is not None and not sys.stdin.isatty():
        return _stdin().strip("\n") or None
    return prompt


def _stdin() -> str:
    """All of stdin. Says so when nothing comes: a pipe left open looks like a hanging program."""
    try:
        waiting = not select.select([sys.stdin], [], [], 1.0)[0]
    except (OSError, ValueError):  # not everything can be asked
        waiting = False
    if waiting:
        note("reading the prompt from stdin; -p TEXT gives one directly")
    return sys.stdin.buffer.read().decode("utf-8", "replace")
