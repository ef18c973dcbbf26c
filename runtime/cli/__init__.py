"""The `runtime` command. Every subcommand is a module of its own, imported when it is called.

Tokens and tables go to stdout, progress and timings to stderr. A mistake is one line on stderr;
the exit status is 2 for a command line that cannot be used, 1 for what fails later, 130 after
Ctrl-C.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from runtime import __version__

# name -> what it does; the texts stand here so that `runtime --help` imports no command
COMMANDS = {
    "run": "Answer a prompt, talk, or continue a text.",
    "chat": "Talk with a model.",
    "bench": "Measure prompt and decode speed, in llama-bench's columns.",
    "perplexity": "Measure how well a model predicts a text; compare with a base.",
    "compare": "Show what cache or weight types cost in quality and give in speed.",
    "quantize": "Write a model's file with smaller weights.",
    "inspect": "Show what is in a model file, and the memory it needs.",
    "plan": "Say whether a model fits on some devices, and how it is split.",
    "convert": "Write a Hugging Face checkpoint as a GGUF file.",
    "imatrix": "Collect an importance matrix for a quantiser.",
    "devices": "Show the processor, its instruction sets, and memory.",
    "warmup": "Compile the kernels a model needs, once for this machine.",
    "cache": "Show or remove the packed weights that --pack-cache keeps.",
}
_NAMES_MPI = re.compile(r"(-\S+=)?[\w*.,:/()]*\bmpi\b[\w*.,:/()]*", re.IGNORECASE)
_HELPERS = {"help": "This text, or that of a command.", "version": "Show the version."}

# Commands of Ollama and llama.cpp, and what there is instead.
_ELSEWHERE = {
    "pull": "models are not downloaded here: give the path of a .gguf file",
    "serve": "there is no server in this version",
    "server": "there is no server in this version",
    "ps": "nothing stays loaded between two commands",
    "stop": "nothing stays loaded between two commands",
    "list": "models are files here: give the path of one",
    "ls": "models are files here: give the path of one",
    "rm": "models are files here: remove the file",
    "cp": "models are files here: copy the file",
    "create": "there are no Modelfiles here: options and --system say what they would",
    "push": "models are files here",
    "show": "use 'runtime inspect FILE'",
    "info": "use 'runtime inspect FILE'",
    "cli": "use 'runtime run' or 'runtime chat'",
    "completion": "use 'runtime run --raw'",
}

EXAMPLES = """\b
Examples:
  runtime run                                   a story by the bundled model
  runtime model.gguf                            talk with a model of yours
  runtime run model.gguf -p "Why is the sky blue?"
  runtime bench model.gguf -p 512 -n 128 -r 5
  runtime inspect model.gguf
  runtime help run                              all options of a command
"""


class CommandGroup(click.Group):
    """Imports a command on first use, and turns mistakes into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the help text."""
        return [*COMMANDS, *_HELPERS]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """A command, whose module is imported now; None: there is none of the name."""
        if name in COMMANDS:
            return importlib.import_module(f"runtime.cli.{name}").command
        return super().get_command(ctx, name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, from texts kept here: no command is imported."""
        with formatter.section("Commands"):
            formatter.write_dl([*COMMANDS.items(), *_HELPERS.items()])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Words without a command are of `run`; see `_is_run`."""
        if args == ["-v"]:  # of a command it is --verbose; alone, as people mean it
            args = ["--version"]
        return super().parse_args(ctx, ["run", *args] if _is_run(args) else args)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """UsageError names the nearest command, or who does what other programs do so."""
        name = click.utils.make_str(args[0])
        if name in _ELSEWHERE:
            ctx.fail(f"no command {name!r}: {_ELSEWHERE[name]}")
        if name not in COMMANDS and name not in _HELPERS:
            near = _meant(name)
            hint = f"did you mean {near!r}? " if near else ""
            ctx.fail(f"no command and no file {name!r}: {hint}there are {', '.join(COMMANDS)}")
        return super().resolve_command(ctx, args)

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None,
        complete_var: str | None = None, standalone_mode: bool = True, **extra: Any,
    ) -> Any:  # fmt: skip
        """Run and exit: 0, 2 for a wrong command line, 1 for another mistake, 130 after Ctrl-C."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        _write_any_character()
        _take_part(sys.argv[1:] if args is None else args)
        with warnings.catch_warnings():
            warnings.showwarning = _Warnings().show
            code = self._code(args, prog_name, complete_var, **extra)
        sys.exit(code if isinstance(code, int) else 0)

    def _code(self, args: Any, prog_name: Any, complete_var: Any, **extra: Any) -> Any:
        """The exit status of a run; a mistake is one line on stderr."""
        try:
            colour = {"color": _colour(), **extra}
            return super().main(args, prog_name, complete_var, False, **colour)
        except click.Abort:
            return 130
        except Exception as error:
            from runtime.cli.output import printable

            click.echo(f"error: {printable(' '.join(_mistake(error).split()))}", err=True)
            return 2 if isinstance(error, click.UsageError) else 1


def _take_part(args: Sequence[str]) -> None:
    """Of an MPI run all processes but the first do as that says, and no more than that."""
    if any(_NAMES_MPI.fullmatch(arg) for arg in args):
        from runtime.backends.meta.mpi import take_part
        from runtime.backends.meta.processes import launched
        from runtime.errors import OptionError
        from runtime.gguf.reader import open_gguf

        if launched():
            with contextlib.suppress(OptionError):  # whatever loads a model will say it
                take_part(open_gguf)


def _is_run(args: Sequence[str]) -> bool:
    """Whether a command line begins with a model or an option of `run`, and not with a command."""
    if not args or args[0] in (*COMMANDS, *_HELPERS, *_ELSEWHERE):
        return False
    first = args[0]
    if first.startswith("-"):
        return first not in ("-h", "--help", "--usage", "--version")
    return any(c in first for c in "/\\:") or first.endswith(".gguf") or Path(first).exists()


def _meant(name: str) -> str | None:
    """The command or the model's file of nearly that name."""
    from runtime.missing import near_file

    near = difflib.get_close_matches(name, [*COMMANDS, *_HELPERS], n=1)
    if near:
        return near[0]
    file = near_file(Path(name))
    return None if file is None else str(file)


def _colour() -> bool | None:
    """False where the user or the terminal wants no escape sequences; else by the stream."""
    unwanted = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return False if unwanted else None


def _mistake(error: Exception) -> str:
    """What to say about a mistake; an error that is no mistake is raised again."""
    from runtime.cli.parsing import Refused
    from runtime.errors import Error

    if isinstance(error, click.UsageError) and not isinstance(error, Refused):
        where = error.ctx.command_path if error.ctx else "runtime"
        return f"{error.format_message().rstrip('.')} ({where} -h shows what there is)"
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


class _Warnings:
    """Shows what modules warn of as lines for a user, each once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def show(self, message: Warning | str, *_: Any, **__: Any) -> None:
        """Stands in for `warnings.showwarning`."""
        text = " ".join(str(message).split())
        if text not in self._said:
            self._said.add(text)
            click.secho(f"warning: {text}", err=True, dim=True)


def _write_any_character() -> None:
    """Let text pass through a terminal or pipe that cannot show every character."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


@click.group(
    cls=CommandGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help", "--usage"], "max_content_width": 100},
    epilog=EXAMPLES,
)
@click.version_option(__version__, prog_name="runtime")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Run GGUF language models on this machine. With no MODEL, a small bundled one is used."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@main.command("help")
@click.argument("name", required=False, metavar="[COMMAND]")
@click.pass_context
def _help(ctx: click.Context, name: str | None) -> None:
    """Show the help text, or that of a command."""
    group = ctx.find_root()
    if name is None:
        click.echo(group.get_help())
        return
    _, found, _ = main.resolve_command(group, [name])  # type: ignore[attr-defined]
    with click.Context(found, info_name=name, parent=group) as inner:
        click.echo(found.get_help(inner))


@main.command("version")
def _version() -> None:
    """Show the version."""
    click.echo(f"runtime, version {__version__}")
