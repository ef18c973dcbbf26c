"""`runtime cache`: what is kept on disk of weights and prompts, and how to be rid of it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from runtime.cli.model_path import model_argument, model_option
from runtime.cli.options import load_arguments, model_options
from runtime.cli.output import note, size, table
from runtime.cli.parsing import Command, Refused, option
from runtime.cli.prompt import given_prompt
from runtime.units import counted_as

_DAY, _HOUR = 86400, 3600
_WRITTEN = "being written"
_ACTIONS = ("ls", "explain", "clear")
_OPTIONS, _PROMPT = "Options", "Prompt"
_BEGINNING = 48  # characters of a prompt that are shown


@click.command(
    "cache",
    cls=Command,
    epilog="""\b
Examples:
  runtime cache ls                      what is kept in the cache folder, of all models
  runtime cache ls model.gguf           of this model, with the beginning of its prompts
  runtime cache explain model.gguf -f prompt.txt    what of a prompt would not be read again
  runtime cache clear model.gguf        be rid of it
  runtime cache clear                   of all in the cache folder
""",
)
@click.argument("words", nargs=-1, metavar="[ls|explain|clear] [MODEL]")
@model_option
@option("--cache-dir", "The folder of prompts (default: the cache folder).", _OPTIONS,
        metavar="DIR")  # fmt: skip
@option("--remove", "As clear.", _OPTIONS, is_flag=True)
@option("--json as_json", "As JSON.", _OPTIONS, is_flag=True)
@option("-p --prompt", "The prompt to explain; - reads stdin.", _PROMPT, metavar="TEXT")
@option("-f --file", "Read it from FILE; - reads stdin.", _PROMPT, metavar="FILE")
@option("-e --escape", r"Read \n, \t, \" and the like in -p as one character.", _PROMPT,
        is_flag=True)  # fmt: skip
@option("--raw", "It is read as it is, without the chat template.", _PROMPT, is_flag=True)
@option("-sys --system system", "Instructions before it.", _PROMPT, metavar="TEXT")
@model_options
def command(
    words: tuple[str, ...], model_option: str | None, cache_dir: str | None, remove: bool,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Show what --pack-cache and --cache-dir have kept, explain a prompt, or remove it.

    Packed weights, also what a writer left that was killed; what is being written just now is not
    removed, and a process that uses such a file keeps it until it ends. Prompts, of each model and
    way of loading it. What options of a model matter to explain are those it is run with. Compiled
    kernels are in the same folder, need a few MiB, and go by themselves a month after their last
    use.
    """
    action, rest = (words[0], words[1:]) if words[:1] and words[0] in _ACTIONS else ("ls", words)
    if len(rest) > 1:
        raise click.UsageError(f"unexpected {rest[1]!r}: {', '.join(_ACTIONS)}, then a model")
    model = model_argument(rest[0] if rest else None, model_option)
    if action == "explain":
        _explain(model, cache_dir, options)
        return
    found = [about for path in _files(model) if (about := _about(path))]
    prompts = _folders(model, cache_dir)
    filled = [folder for folder in prompts if folder.files]
    if as_json:
        click.echo(json.dumps([*found, *map(_described, filled)], indent=1))
    else:
        _show(found, filled, model)
    if (remove or action == "clear") and not _cleared(found, prompts):
        raise click.exceptions.Exit(1)


def _show(found: list[dict[str, Any]], prompts: list[Any], model: str | None) -> None:
    if found:
        rows = [(f["file"], f["model"], size(f["bytes"]), _ago(f["used"])) for f in found]
        click.echo(table(rows, ("packed weights", "model", "size", "last used"), "size"))
    if prompts:
        lines = [
            (d["model"], d["kv_type"], str(d["prompts"]), str(d["tokens"]), size(d["bytes"]),
             _ago(d["used"])) for d in map(_described, prompts)
        ]  # fmt: skip
        heads = ("prompts of", "kv type", "prompts", "tokens", "size", "last used")
        click.echo(table(lines, heads, "prompts,tokens,size"))
        if model is not None:
            _show_prompts(prompts, model)
    if not found and not prompts:
        note("no packed weights and no prompts are kept" + (f" of {model}" if model else ""))


def _show_prompts(folders: list[Any], model: str) -> None:
    """Each prompt of a model, and how it begins."""
    from runtime.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_gguf(model)
    rows = []
    for folder in folders:
        for prompt in folder.prompts():
            text = " ".join(tokenizer.decode(prompt.tokens[:64], skip_special=True).split())
            rows.append((text[:_BEGINNING], str(len(prompt.tokens)), _ago(prompt.used)))
    if rows:
        click.echo(table(rows, ("begins with", "tokens", "last used"), "tokens"))


def _described(folder: Any) -> dict[str, Any]:
    heads = [block for block, _ in folder.blocks()]
    about = {name: folder.about.get(name, "unknown") for name in ("model", "kv_type", "devices")}
    return {
        "file": str(folder.path), **about, "prompts": len(folder.prompts()),
        "tokens": sum(len(head.tokens) for head in heads), "bytes": folder.nbytes,
        "used": folder.used,
    }  # fmt: skip


def _folders(model: str | None, cache_dir: str | None) -> list[Any]:
    """Folders of prompts, of a model or of all."""
    from runtime.backends import environment
    from runtime.errors import OptionError
    from runtime.memory.prompt_folders import folders

    try:
        found = folders(Path(cache_dir) if cache_dir else environment.cache_dir())
    except OptionError as error:
        raise Refused(str(error)) from None
    if model is None:
        return found
    path = str(Path(model).resolve())
    return [folder for folder in found if folder.about.get("model") == path]


def _cleared(found: list[dict[str, Any]], prompts: list[Any]) -> bool:
    """Whether all of it is gone."""
    removed = [f for f in found if _removed(Path(f["file"]))]
    total, folders = sum(f["bytes"] for f in removed), 0
    for folder in prompts:
        try:
            total += folder.remove()
            folders += 1
        except OSError as error:
            note(f"{folder.path} cannot be removed: {error.strerror}")
    if found or prompts:
        also = f" and the prompts of {counted_as(folders, 'model')}" if prompts else ""
        note(f"removed {counted_as(len(removed), 'file')}{also}, {size(total)}")
    return len(removed) == len(found) and folders == len(prompts)


def _explain(model: str | None, cache_dir: str | None, options: dict[str, Any]) -> None:
    """What of a prompt would be reused, and why no more."""
    from runtime.backends import environment
    from runtime.cli.facts import has_chat_template
    from runtime.cli.model_path import load

    prompt = given_prompt(options, (), piped=True)
    if prompt is None:
        raise click.UsageError("there is no prompt to explain: give one with -p TEXT or -f FILE")
    folder = cache_dir or str(environment.cache_dir())
    with load(model, **load_arguments(options, True), cache_dir=folder) as loaded:
        tokenizer = loaded.tokenizer
        if options["raw"] or not has_chat_template(loaded.file):
            ids = tokenizer.encode(prompt)
        else:
            system = options["system"]
            said = [{"role": "system", "content": system}] if system else []
            said.append({"role": "user", "content": prompt})
            ids = tokenizer.chat_template.encode(tokenizer, said)
        disk = loaded._engine.disk
        click.echo(disk.explain(ids, bool(loaded._engine.memory.slots), tokenizer.decode))


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
