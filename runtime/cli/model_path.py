"""What a user gives as the model: a file, or a name that other programs would download."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from runtime.cli.output import note
from runtime.cli.parsing import Refused, option
from runtime.missing import NO_DOWNLOAD, URL, fetch, near_file, of_ollama, repository, tagged

_NAME = re.compile(r"[\w.-]+")


model_option = option(
    "-m --model model_option", "The model's file, in place of the argument MODEL.", "Model",
    metavar="FILE",
)  # fmt: skip


def load(path: str | None, **arguments: Any) -> Any:
    """`runtime.load`; UsageError for an option that cannot be used."""
    import runtime
    from runtime.backends.cpu.run.cores import processors
    from runtime.errors import OptionError

    threads = arguments.get("threads")
    if threads is not None and threads > processors():
        note(
            f"-t {threads} is more than the {processors()} processors here, which makes it slower",
            arguments.get("progress") is False,
        )
    try:
        return runtime.load(path, **arguments)
    except OptionError as error:
        raise Refused(str(error)) from None


def model_argument(text: str | None, option: str | None) -> str | None:
    """The model from the argument or from -m; UsageError when both are given, or no path is."""
    if text is not None and option is not None:
        raise click.UsageError(f"the model is given twice: {option} and {text}")
    return model_file(text if text is not None else option)


def model_file(text: str | None) -> str | None:
    """The path of a model; UsageError, in one line, for what can only be a name elsewhere.

    A file that is there is taken whatever its name; that a path is not there is left to the
    reader of files to say, unless a file of nearly that name is.
    """
    if text is None or Path(text).is_file():
        return text
    if not text.strip():
        raise Refused("the model's name is empty: give the path of a .gguf file")
    if Path(text).is_dir():
        raise Refused(_folder(Path(text)))
    line = _download(text)
    if line is not None:
        raise Refused(line)
    near = near_file(Path(text))
    if near is not None:
        raise click.ClickException(f"{text}: there is no such file; did you mean {near}?")
    if _NAME.fullmatch(text) and not text.endswith(".gguf"):
        raise Refused(of_ollama(text, "latest"))
    return text


def _download(text: str) -> str | None:
    """What to do about a name that another program would fetch; None for a plain path."""
    if URL.match(text):
        return f"{NO_DOWNLOAD}: fetch it first, 'curl -LO {text}', then give the file"
    hub = repository(text)
    if hub is not None:
        return f"{text} is no file here, and {fetch(hub)}"
    return tagged(text)


def _folder(path: Path) -> str:
    """What to give instead of a folder."""
    names = sorted(file.name for file in path.glob("*.gguf"))
    if names:
        return f"{path} is a folder: give one of its files, {_listed(names)}"
    if any(path.glob("*.safetensors")):
        return (
            f"{path} holds safetensors and no .gguf file: 'runtime convert {path} OUT.gguf' makes "
            "one of them"
        )
    return f"{path} is a folder, with no .gguf file in it"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
