"""`runtime cache`: packed weights on disk, and how to be rid of them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from runtime.cli.model_path import model_argument, model_option
from runtime.cli.output import note, size, table
from runtime.cli.parsing import Command, option
from runtime.units import counted_as

_DAY, _HOUR = 86400, 3600


@click.command(
    "cache",
    cls=Command,
    epilog="""\b
Examples:
  runtime cache                         what --pack-cache has kept in the cache folder
  runtime cache model.gguf              of this model, beside it too
  runtime cache model.gguf --remove
  runtime cache --remove                all of it in the cache folder
""",
)
@click.argument("model", required=False)
@model_option
@option("--remove", "Remove the files that are listed.", "Options", is_flag=True)
@option("--json as_json", "As JSON.", "Options", is_flag=True)
def command(model: str | None, model_option: str | None, remove: bool, as_json: bool) -> None:
    """Show the files of packed weights that --pack-cache has kept, or remove them.

    A process that uses such a file keeps it until it ends. Compiled kernels are in the same
    folder, need a few MiB, and are removed by themselves a month after their last use.
    """
    model = model_argument(model, model_option)
    found = [_about(path) for path in _files(model)]
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


def _files(model: str | None) -> list[Path]:
    """Of a model, or all in the cache folder."""
    from runtime.backends.cpu.run.pack_cache import FOLDER, files_in, model_of
    from runtime.backends.environment import cache_dir

    kept = files_in(cache_dir() / FOLDER)
    if model is None:
        return kept
    own = Path(model).resolve()
    every = dict.fromkeys((*kept, *files_in(own.parent)))
    return [path for path in every if model_of(path) == own]


def _about(path: Path) -> dict[str, Any]:
    from runtime.backends.cpu.run.pack_cache import model_of

    stat, model = path.stat(), model_of(path)
    return {
        "file": str(path), "model": _named(model), "bytes": stat.st_size,
        "used": max(stat.st_atime, stat.st_mtime),
    }  # fmt: skip


def _named(model: Path | None) -> str:
    if model is None:
        return "unfinished or damaged"
    return str(model) if model.exists() else f"{model} (not there)"


def _ago(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    if seconds < _DAY:
        hours = int(seconds // _HOUR)
        return f"{counted_as(hours, 'hour')} ago" if hours else "just now"
    return f"{counted_as(int(seconds // _DAY), 'day')} ago"


def _removed(path: Path) -> bool:
    try:
        path.unlink()
    except OSError as error:
        note(f"{path} cannot be removed: {error.strerror}")
        return False
    return True
