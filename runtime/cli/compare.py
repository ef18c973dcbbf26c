"""`runtime compare`: what cache or weight types cost in quality, and what they give in speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from runtime.cli import bench
from runtime.cli.bench_plan import UBATCH, Numbers, Setting, Test, tests
from runtime.cli.bench_result import deviation
from runtime.cli.model_path import load, model_file, model_option
from runtime.cli.options import (
    Windows,
    kv_type,
    listed_types,
    precision_arguments,
    precision_options,
)
from runtime.cli.output import note, printable
from runtime.cli.parsing import THREADS, Command, Refused, option
from runtime.cli.perplexity import measured_text, within_context
from runtime.progress import reporter

if TYPE_CHECKING:
    from runtime.quality.divergence import Estimate
    from runtime.quality.sweep import Row, Variant

_WHAT, _TEXT, _SPEED, _OUTPUT = "What is compared", "Text", "Speed", "Output"
_FOREIGN = {
    "cache": ("kv_type", "cache_type_k", "cache_type_v", "imatrix"), "types": ("rotation",)
}  # fmt: skip
_DEPTHS = (0, 4096, 16384)


@click.command(
    "compare",
    cls=Command,
    epilog="""\b
Examples:
  runtime compare model.gguf --sweep cache
  runtime compare model.gguf --sweep cache --types f16,q8_0,q8_0/q4_0 --no-speed
  runtime compare model-f16.gguf --sweep types --types Q8_0,Q4_K_M,Q4_0
  runtime compare model-f16.gguf --files model-q8_0.gguf model-q4_k_m.gguf
  runtime compare model.gguf --sweep cache -f wiki.test.raw --svg caches.svg -o csv
""",
)
@click.argument("models", nargs=-1, metavar="[MODEL] [FILE]...")
@model_option
@option("--sweep", "cache: a model with caches of several types, against f32; types: files of one "
        "model, against the first.", _WHAT, type=click.Choice(["cache", "types"]),
        metavar="cache|types")  # fmt: skip
@option("--types", "Which cache types (all), K/V for K and V apart, such as q8_0/q4_0; or the "
        "weight types that MODEL is quantised to.", _WHAT, multiple=True,
        metavar="TYPE,...")  # fmt: skip
@option("--files", "The files to compare with MODEL. May be repeated.", _WHAT, multiple=True,
        metavar="FILE...")  # fmt: skip
@option("--imatrix", "Importance matrix for weight types that are made.", _WHAT,
        metavar="FILE")  # fmt: skip
@option("--rotation", "both: quantised caches also plain, that is not rotated.", _WHAT,
        type=click.Choice(["both"]), metavar="both")  # fmt: skip
@option("-f --file", "The text, UTF-8; - is stdin (stories that come with the package).", _TEXT,
        metavar="FILE")  # fmt: skip
@option("-c --context window | --ctx-size", "Tokens of a window.", _TEXT, type=click.IntRange(3),
        default=512, show_default=True, metavar="N")  # fmt: skip
@option("--chunks", "The first N windows alone; -1 all.", _TEXT, default=8, show_default=True,
        type=Windows(), metavar="N")  # fmt: skip
@option("--no-speed", "Quality alone.", _SPEED, is_flag=True)
@option("-d --depths | --n-depth", "Tokens in the cache before what is timed (0,4096,16384, those "
        "that fit).", _SPEED, type=Numbers(0), metavar="N,...")  # fmt: skip
@option("-p --n-prompt", "Tokens of the prompt that is timed.", _SPEED, default=512,
        type=click.IntRange(0), show_default=True, metavar="N")  # fmt: skip
@option("-n --n-gen", "Tokens that are decoded one by one.", _SPEED, default=32,
        type=click.IntRange(0), show_default=True, metavar="N")  # fmt: skip
@option("-r --repetitions", "Times each is timed.", _SPEED, type=click.IntRange(1), default=3,
        show_default=True, metavar="N")  # fmt: skip
@option("-o --output", "Format of the table: md, json or csv.", _OUTPUT, default="md",
        type=click.Choice(["md", "json", "csv"]), show_default=True, metavar="FORMAT")  # fmt: skip
@option("--svg", "Draw divergence against bytes, and the speeds.", _OUTPUT, metavar="FILE")
@option("-q --quiet", "Nothing on stderr.", _OUTPUT, is_flag=True)
@option("-t --threads", "Threads of all devices together (default: one per core).", "Model",
        type=THREADS, metavar="N")  # fmt: skip
@precision_options
def command(models: tuple[str, ...], model_option: str | None, **options: Any) -> None:
    """Show in one table what cache types or quantised files cost and give.

    Of each: bytes, perplexity of a text, divergence of its predictions from those of the base,
    and how fast prompts and answers are with so many tokens in the cache.
    """
    from runtime.backends.cpu.run.cores import physical_cores
    from runtime.cli import facts
    from runtime.gguf.reader import open_gguf
    from runtime.model import demo_path
    from runtime.ops.kv_formats import KV_FORMATS
    from runtime.outputs import check_outputs, write_text
    from runtime.quality.windows import BUNDLED
    from runtime.report.sweep import FORMATS, PLAIN, Table

    given = [model_option] if model_option is not None else []
    paths = [str(model_file(path)) for path in (*given, *models)] or [str(demo_path())]
    paths[1:1] = [str(model_file(path)) for path in options["files"]]
    several, made = len(paths) > 1, options["sweep"] == "types" and bool(options["types"])
    paths = [*{Path(path).resolve(): path for path in reversed(paths)}.values()][::-1]
    kind = options["sweep"] or ("types" if several else "cache")
    if (several and kind == "cache") or (kind == "types" and not made and len(paths) == 1):
        raise click.UsageError(
            "--sweep cache compares caches of one MODEL; --sweep types needs --files or --types, "
            "which are made of MODEL"
        )
    _check_meaning(f"--sweep {kind}", _FOREIGN[kind])
    if kind == "types" and not options["types"]:
        _check_meaning("--files alone", ("imatrix",))
    if options["rotation"] and not options["cache_rotation"]:
        raise click.UsageError("--rotation both has rotated caches, too: no --no-cache-rotation")
    if options["no_speed"]:
        _check_meaning("--no-speed", ("depths", "n_prompt", "n_gen", "repetitions"))
    file, quiet = open_gguf(paths[0]), options["quiet"]
    timed = [] if options["no_speed"] else _tests(file, options)
    context = max([options["window"], *(test.n_depth + test.tokens for test in timed)])
    within_context(file, options["window"], "-c")
    within_context(file, context, "-d, with the tokens that are timed")
    loaded = partial(_loaded, options, context)
    picture = options["svg"]
    read = [part for path in paths for part in open_gguf(path).paths]
    check_outputs([picture], [options["file"], options["imatrix"], *read])
    rows: list[Row] = []
    cache = ""
    with TemporaryDirectory() as folder:
        if kind == "cache":
            variants = _caches(file, options, partial(loaded, paths[0]))
        else:
            cache = kv_type(options).replace(",", "/")
            weights = partial(loaded, kv_type=kv_type(options))
            shared = any(KV_FORMATS[kind].shared for kind in cache.split("/"))
            cache += PLAIN * (shared and not options["cache_rotation"])
            variants = _weights(paths, options, weights, folder)
        try:
            for row in _rows(variants, timed, options):
                rows.append(row)
        finally:  # what was measured is shown, whatever ends it
            if rows:
                threads = options["threads"] or physical_cores()
                text = Path(options["file"] or BUNDLED).name if options["file"] != "-" else "stdin"
                table = Table(
                    facts.model_type(file), kind, rows, threads, file.path.name, text, cache
                )
                click.echo(printable(FORMATS[options["output"]](table)))
    if picture is not None:
        from runtime.report.sweep_svg import draw

        write_text(picture, draw(table))
        note(f"wrote {picture}", quiet)


def _check_meaning(where: str, names: Sequence[str]) -> None:
    """UsageError for options that are given and would have no effect."""
    context = click.get_current_context()
    for name in names:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            shown = name.replace("_", "-")
            raise click.UsageError(f"--{shown} has no meaning with {where}")


def _rows(
    variants: Sequence[Variant], timed: Sequence[Test], options: dict[str, Any]
) -> Iterator[Row]:
    """Of each variant, as it has been measured."""
    from runtime.quality.sweep import sweep

    count = options["chunks"]
    most = None if count is None else options["window"] * max(2, count)
    text = measured_text(options["file"], options["quiet"], most)
    speeds = partial(_speeds, timed, options["repetitions"])
    with reporter(not options["quiet"]) as report:
        yield from sweep(variants, text, options["window"], options["chunks"], speeds,
                         len(timed), report)  # fmt: skip


def _tests(file: Any, options: dict[str, Any]) -> list[Test]:
    """What is timed, by depth; by default at the depths that the model was trained for."""
    from runtime.cli.summary import trained_context

    prompt, answer, depths = options["n_prompt"], options["n_gen"], options["depths"]
    if depths is None:
        trained = trained_context(file) or 0
        depths = [d for d in _DEPTHS if not d or d + max(prompt, answer) <= trained]
    found = tests([prompt], [answer], [], sorted(set(depths)))
    if not found:
        raise click.UsageError("nothing to time: give -p or -n more than 0, or --no-speed")
    return found


def _loaded(options: dict[str, Any], context: int, path: str, **given: Any) -> Any:
    """A model to measure; its cache has room for a few windows, or for one sequence that deep."""
    arguments = precision_arguments(options) | given
    arguments |= {"progress": False if options["quiet"] else None, "prompt_cache": False}
    return load(path, context=context, threads=options["threads"], sequences=2, **arguments)


def _caches(file: Any, options: dict[str, Any], loaded: Callable[..., Any]) -> list[Variant]:
    """Caches of the types asked for, after that of the base; UsageError for an unknown one."""
    from runtime.cli import facts
    from runtime.ops.kv_formats import KV_FORMATS, PAGE
    from runtime.quality.sweep import Variant
    from runtime.report.sweep import PLAIN

    kinds = [listed_types("--types", name, 2) for name in _names(options) or KV_FORMATS]
    found = []
    rotations = (options["cache_rotation"], *((False,) if options["rotation"] else ()))
    nbytes = {kind: facts.memory(file, kind).page / PAGE / 2 for kind in KV_FORMATS}
    for k, v in dict.fromkeys([("f32", "f32"), *((kind[0], kind[-1]) for kind in kinds)]):
        size, name = nbytes[k] + nbytes[v], k if k == v else f"{k}/{v}"
        rotated = any(KV_FORMATS[kind].shared for kind in (k, v))
        for rotation in dict.fromkeys(rotations if rotated else rotations[:1]):
            shown = name + PLAIN * (rotated > rotation)
            load = partial(loaded, kv_type=f"{k},{v}", cache_rotation=rotation)
            found.append(Variant(shown, size, 16 * size / nbytes["f32"], load))
    return found


def _weights(
    paths: Sequence[str], options: dict[str, Any], loaded: Callable[..., Any], folder: str
) -> list[Variant]:
    """The base, then its files of other types and what is made of it, the largest first."""
    from runtime.cli import facts
    from runtime.cli.quantize import named
    from runtime.errors import OptionError
    from runtime.gguf.reader import open_gguf
    from runtime.quality.sweep import Variant
    from runtime.quantise.job import plan

    files = [open_gguf(path) for path in paths]
    for file in files[1:]:
        _check_alike(files[0], file)
    names = [facts.type_name(file) for file in files]
    if len(set(names)) < len(names):
        names = [file.path.stem for file in files]
    sizes = [(file.tensors_nbytes, facts.n_params(file)) for file in files]
    loads = [partial(loaded, path) for path in paths]
    origins = [Path(path).name for path in paths]
    for kind in dict.fromkeys(name.upper() for name in _names(options)):
        try:
            job = plan(paths[0], kind, imatrix=options["imatrix"])
        except OptionError as error:
            raise Refused(f"--types: {named(str(error))}") from None
        names.append(kind)
        origins.append("")
        sizes.append((job.nbytes, sizes[0][1]))
        loads.append(partial(_made, job, Path(folder) / f"{kind}.gguf", options["threads"], loaded))
    found = [
        Variant(name, nbytes, 8 * nbytes / n_params, load, origin)
        for name, (nbytes, n_params), load, origin in zip(names, sizes, loads, origins, strict=True)
    ]
    return [found[0], *sorted(found[1:], key=lambda variant: -variant.nbytes)]


def _check_alike(base: Any, file: Any) -> None:
    """Refused for a file of another architecture than the base, or of other tokens."""
    tokens = "tokenizer.ggml.tokens"
    if file.architecture != base.architecture:
        which = f"{file.architecture}, another architecture than {base.architecture}"
    elif [*file.get(tokens, ())] != [*base.get(tokens, ())]:
        which = "a model of other tokens than those"
    else:
        return
    raise Refused(f"{file.path} is {which} of {base.path}: predictions cannot be compared")


def _made(job: Any, path: Path, threads: int | None, loaded: Callable[..., Any]) -> Any:
    """A model whose file is made for it, and is gone once it is loaded."""
    job.write(path, threads)
    try:
        return loaded(str(path))
    finally:
        path.unlink()


def _names(options: dict[str, Any]) -> list[str]:
    return [name.strip() for listed in options["types"] for name in listed.split(",")]


def _speeds(timed: Sequence[Test], repetitions: int, model: Any) -> Iterator[tuple[str, Estimate]]:
    """Tokens/s of each test, by its name; one sequence grows from depth to depth."""
    import numpy as np

    from runtime.quality.divergence import Estimate

    random, setting = np.random.default_rng(1), Setting(None, 2048, UBATCH, "", "", None)
    with model.session() as session:
        for test in timed:
            missing = test.n_depth - len(session)
            if missing:
                session.eval(bench.random_tokens(random, model, missing), logits="none")
            with session.snapshot() as before:
                found = []
                for _ in range(1 + repetitions):  # the first is for what is done once
                    found.append(test.tokens / bench.timed(session, test, setting, random))
                    session.restore(before)
            yield test.name, Estimate(fmean(found[1:]), deviation(found[1:]))
