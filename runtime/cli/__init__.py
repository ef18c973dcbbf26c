"""The `runtime` command. Every subcommand is a module of its own, imported when it is called.

Tokens and tables go to stdout, progress and timings to stderr. A mistake is one line on stderr
and exit status 1; Ctrl-C ends with 130.
"""

from __future__ import annotations

import errno
import importlib
import sys
from collections.abc import Sequence
from typing import Any

import click

from runtime import __version__

# name -> what it does; the texts stand here so that `runtime --help` imports no command
COMMANDS = {
    "run": "Continue a text.",
    "chat": "Talk with a model.",
    "bench": "Measure prompt and decode speed, in llama-bench's columns.",
    "inspect": "Show what is in a model file, and the memory it needs.",
    "devices": "Show the processor, its instruction sets, and memory.",
    "warmup": "Compile the kernels a model needs, once for this machine.",
}

EXAMPLES = """\b
Examples:
  runtime run                                   a story by the bundled model
  runtime run model.gguf -p "Once upon a time" -n 64
  runtime chat model.gguf
  runtime bench model.gguf -p 512 -n 128 -r 5
  runtime inspect model.gguf
"""


class CommandGroup(click.Group):
    """Imports a command on first use, and turns mistakes into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"runtime.cli.{name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = click.utils.make_str(args[0])
        if name not in COMMANDS and not name.startswith("-"):
            import difflib

            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            ctx.fail(f"no command {name!r}: {hint}there are {', '.join(COMMANDS)}")
        return super().resolve_command(ctx, args)

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None,
        complete_var: str | None = None, standalone_mode: bool = True, **extra: Any,
    ) -> Any:  # fmt: skip
        """Run and exit: 0, 1 after a mistake (one line on stderr), 130 after Ctrl-C."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        _write_any_character()
        try:
            code = super().main(args, prog_name, complete_var, False, **extra)
        except click.Abort:
            code = 130
        except Exception as error:
            click.echo(f"error: {' '.join(_mistake(error).split())}", err=True)
            code = 1
        sys.exit(code if isinstance(code, int) else 0)


def _mistake(error: Exception) -> str:
    """What to say about a mistake; an error that is no mistake is raised again."""
    from runtime.errors import Error

    if isinstance(error, click.UsageError):
        where = error.ctx.command_path if error.ctx else "runtime"
        return f"{error.format_message()} ({where} -h shows what there is)"
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, MemoryError):
        return "out of memory: use a smaller context (-c), --kv-type q8_0, or a smaller model"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EIO):
        return f"cannot write to stdout: {error.strerror}"
    if isinstance(error, Error | OSError):
        return str(error)
    raise error


def _write_any_character() -> None:
    """Let text pass through a terminal or pipe that cannot show every character."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


@click.group(
    cls=CommandGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EXAMPLES,
)
@click.version_option(__version__, prog_name="runtime")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Run GGUF language models on this machine. With no MODEL, a small bundled one is used."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
