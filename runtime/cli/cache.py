"""`runtime cache`: packed weights on disk, and how to be rid of them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from runtime.cli.model_path import model_argument, model_option
from runtime.cli.output import note, size, table
from runtime.cli.parsing import Command, Refused, option
from runtime.units import counted_as

_DAY, _HOUR = 86400, 3600
_WRITTEN = "being written"


@click.command(
    "cache",
    cls=Command,
    epilog="""\b
Examples:
  runtime cache                         what --pack-cache has kept in the cache folder
  runtime cache model.gguf              of this model, there and beside it
  runtime cache model.gguf --remove
  runtime cache --remove                all of it in the cache folder
""",
)
@click.argument("model", required=False)
@model_option
@option("--remove", "Remove the files that are listed.", "Options", is_flag=True)
@option("--json as_json", "As JSON.", "Options", is_flag=True)
@click.pass_context
def command(
    context: click.Context, model: str | None, model_option: str | None, remove: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Show the files of packed weights that --pack-cache has kept, or remove them.

    Also what a writer left that was killed. What is being written just now is not removed. A
    process that uses such a file keeps it until it ends. Compiled kernels are in the same
    folder, need a few MiB, and are removed by themselves a month after their last use.
    """
    model = model_argument(model, model_option)
    found = [about for path in _files(model) if (about := _about(path))]
    if as_json:
        click.echo(json.dumps(found, indent=1))
    elif found:
        rows = [(f["file"], f["model"], size(f["bytes"]), _ago(f["used"])) for f in found]
        click.echo(table(rows, ("file", "model", "size", "last used"), "size"))
    else:
        note("no packed weights are kept" + (f" of {model}" if model else ""))
    if remove and found:
        removed = [f for f in found if _removed(Path(f["file"]))]
        total = size(sum(f["bytes"] for f in removed))
        note(f"removed {counted_as(len(removed), 'file')}, {total}")
        if len(removed) < len(found):
            context.exit(1)


def _files(model: str | None) -> list[Path]:
    """Of a model, or all in the cache folder. Refused: that is none."""
    from runtime.backends.cpu.run.pack_cache import FOLDER, files_in, files_of
    from runtime.backends.environment import cache_dir
    from runtime.errors import OptionError

    try:
        return files_in(cache_dir() / FOLDER) if model is None else files_of(Path(model).resolve())
    except OptionError as error:
        raise Refused(str(error)) from None


def _about(path: Path) -> dict[str, Any] | None:
    """None: it has just gone."""
    from runtime.backends.plan.entries import last_used

    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return {
        "file": str(path), "model": _named(path), "bytes": stat.st_size,
        "used": last_used(stat),
    }  # fmt: skip


def _named(path: Path) -> str:
    """The model, or why there is none."""
    from runtime.backends.cpu.run.pack_cache import SUFFIX, is_written, model_of

    model = model_of(path)
    if model is not None:
        return str(model) if model.exists() else f"{model} (not there)"
    if is_written(path):
        return _WRITTEN
    return "damaged" if path.suffix == SUFFIX else "unfinished"


def _ago(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    if seconds < _DAY:
        hours = int(seconds // _HOUR)
        return f"{counted_as(hours, 'hour')} ago" if hours else "just now"
    return f"{counted_as(int(seconds // _DAY), 'day')} ago"


def _removed(path: Path) -> bool:
    from runtime.backends.cpu.run.pack_cache import remove

    try:
        removed = remove(path)
    except OSError as error:
        note(f"{path} cannot be removed: {error.strerror}")
        return False
    if not removed:
        note(f"{path} stays: it is {_WRITTEN}")
    return removed
