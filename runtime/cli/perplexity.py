"""`runtime perplexity`: how well a model predicts a text, and how far it is from another model."""

from __future__ import annotations

import json
import sys
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import click

from runtime.cli.model_path import load, model_argument, model_option
from runtime.cli.options import Windows, kv_type, precision_arguments, precision_options
from runtime.cli.output import is_terminal, note, pairs, size, table
from runtime.cli.parsing import THREADS, Command, Refused, option
from runtime.cli.prompt import bytes_of

if TYPE_CHECKING:
    from runtime.quality.divergence import Divergence
    from runtime.quality.perplexity import Perplexity, Soon

_TEXT, _BASE = "Text", "Comparison"
_BYTES = 256  # of text that a token takes at most, on average
_LONG = 1 << 24  # bytes of a text whose tokens take a while
_RELATED = 0.5  # correlation that even a two-bit file has with its base


@click.command(
    "perplexity",
    cls=Command,
    epilog="""\b
Examples:
  runtime perplexity model.gguf -f wiki.test.raw
  runtime perplexity model-f16.gguf -f wiki.test.raw --kl-base base.kld
  runtime perplexity model-q4_k_m.gguf --kl base.kld
  runtime perplexity model-f16.gguf --kl base.kld -ctk q8_0 -ctv q8_0
""",
)
@click.argument("model", required=False)
@model_option
@option("-f --file", "The text, UTF-8; - is stdin (stories that come with the package).", _TEXT,
        metavar="FILE")  # fmt: skip
@option("-c --context window | --ctx-size", "Tokens of a window (512, or as the base has).", _TEXT,
        type=click.IntRange(3), metavar="N")  # fmt: skip
@option("--chunks", "The first N windows alone; -1 all (-1).", _TEXT, default=-1, type=Windows(),
        metavar="N")  # fmt: skip
@option("--kl-base | --kl-divergence-base --save-all-logits", "Write the model's "
        "log-probabilities, to compare others with; llama-perplexity reads the file, too.",
        _BASE, metavar="FILE")  # fmt: skip
@option("--kl", "Compare with such a file, on its text.", _BASE, metavar="FILE")
@option("--kl-divergence", "As llama-perplexity has it: --kl-base is read, not written.", _BASE,
        is_flag=True)  # fmt: skip
@option("--json as_json", "Everything as JSON.", "Output", is_flag=True)
@option("-q --quiet", "Nothing on stderr.", "Output", is_flag=True)
@option("-t --threads", "Threads of all devices together (default: one per core).", "Model",
        type=THREADS, metavar="N")  # fmt: skip
@precision_options
def command(
    model: str | None, model_option: str | None, file: str | None, window: int | None,
    chunks: int | None, kl_base: str | None, kl: str | None, **options: Any,
) -> None:  # fmt: skip
    """Measure how well a model predicts a text: the exponential of its mean surprise by a token.

    The text is cut into windows, and the second half of each is scored, as llama-perplexity does
    it. With a base file also: how far the model's predictions are from those that the base was
    written with (Kullback-Leibler divergence, agreement on the most probable token).
    """
    from runtime.gguf.reader import open_gguf
    from runtime.model import demo_path
    from runtime.outputs import check_outputs
    from runtime.quality.windows import SIZE

    if options["kl_divergence"]:
        if kl is not None or kl_base is None:
            raise click.UsageError("--kl-divergence needs --kl-divergence-base FILE, and no --kl")
        kl, kl_base = kl_base, None
    if kl is not None and kl_base is not None:
        raise click.UsageError("--kl compares with a base and --kl-base writes one: give one")
    path, quiet, kinds = model_argument(model, model_option), options["quiet"], kv_type(options)
    model_file = open_gguf(path or demo_path())
    check_outputs([kl_base], [file, *model_file.paths])
    context = (window or SIZE) if kl is None else _base_size(kl)
    within_context(model_file, context, "-c" if kl is None else f"{kl}, windows of")
    most = None if chunks is None else context * max(2, chunks)
    text = None if kl is not None and file is None else measured_text(file, quiet, most)
    loaded = load(
        path, context=context, threads=options["threads"], kv_type=kinds,
        progress=not quiet, **precision_arguments(options),
    )  # fmt: skip
    with closing(loaded), _running(quiet) as on_window:
        found = loaded.perplexity(
            text, window=window, windows=chunks, kl_base=kl_base, kl=kl,
            on_window=on_window,
        )  # fmt: skip
    click.echo(_as_json(loaded, found) if options["as_json"] else _report(found))
    if found.kl is not None and found.kl.correlation < _RELATED:
        note(
            f"warning: --kl {kl}: its predictions have little to do with this model's (correlation "
            f"{found.kl.correlation:.2%}): is it of another model?"
        )
    if kl_base is not None:
        note(f"wrote {kl_base}", quiet)


def measured_text(file: str | None, quiet: bool = False, tokens: int | None = None) -> str:
    """The text of -f, or the one that comes with the package; as much as so many tokens take."""
    from runtime.quality.windows import BUNDLED, bundled_text

    if file is None:
        note(f"no -f: the text is that of runtime/data/{BUNDLED}", quiet)
        return bundled_text()
    most = -1 if tokens is None else _BYTES * tokens
    data = bytes_of(file, most)
    if len(data) > _LONG and tokens is None:
        note(f"{size(len(data))} of text take a while; --chunks N reads less", quiet)
    if b"\0" in data:
        raise Refused(f"{file}: this is no text (there are zero bytes in it)")
    try:
        return getincrementaldecoder("utf-8")().decode(data, len(data) != most)
    except UnicodeDecodeError as error:
        raise Refused(f"{file}: not UTF-8 at byte {error.start}: give a text in UTF-8") from None


def within_context(file: Any, tokens: int, option: str) -> None:
    """Refused for more tokens than a model was trained for, as `Model.perplexity` has it."""
    from runtime.cli.summary import trained_context

    trained = trained_context(file)
    if trained is not None and tokens > trained:
        raise Refused(f"{option} {tokens}: the model was trained for a context of {trained} tokens")


def _base_size(path: str) -> int:
    """Tokens of a window of a base file."""
    from runtime.quality.base import BaseFile

    with BaseFile(path) as base:
        return base.size


@contextmanager
def _running(quiet: bool) -> Iterator[Callable[[Soon], Any]]:
    """A bar with what is known so far, and a line with it where the user stops it."""
    from runtime.units import counted_as

    last: list[Soon] = []
    try:
        with _shown(quiet) as show:

            def on_window(soon: Soon) -> None:
                last[:] = [soon]
                show(soon)

            yield on_window
    except KeyboardInterrupt:
        for soon in last:
            windows = counted_as(soon.done, "window")
            note(f"\nstopped after {windows} of {soon.total}: {_so_far(soon)}", quiet)
        raise


@contextmanager
def _shown(quiet: bool) -> Iterator[Callable[[Soon], Any]]:
    """A bar with what is known so far; where stderr is no terminal, llama-perplexity's line."""
    if quiet:
        yield lambda _: None
    elif is_terminal(sys.stderr):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), Remaining())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("")
            yield lambda soon: bar.update(
                task, completed=soon.done, total=soon.total, description=_so_far(soon)
            )
    else:
        yield lambda soon: click.echo(
            f"[{soon.done}]{soon.perplexity.value:.4f}" + ",\n"[soon.done == soon.total],
            nl=False, err=True,
        )  # fmt: skip


def _so_far(soon: Soon) -> str:
    kld = "" if soon.kld is None else f"  KLD {soon.kld.shown(6)}"
    return f"perplexity {soon.perplexity.shown(4)}{kld}"


def _as_json(model: Any, found: Perplexity) -> str:
    from runtime.quality.divergence import as_data

    about = {"model": str(model.file.path), "type_k": model.kv_types[0],
             "type_v": model.kv_types[1], "cache_rotation": model.cache_rotation,
             "threads": model.threads}  # fmt: skip
    return json.dumps(about | {"perplexity": as_data(found)}, indent=1)


def _report(found: Perplexity) -> str:
    first = str(found._replace(kl=None))
    return first if found.kl is None else f"{first}\n\n{_compared(found.kl)}"


def _compared(kl: Divergence) -> str:
    rows = [("mean", kl.kld.mean.shown(6), kl.change.mean.scaled(100).shown(3))]
    middle = [
        ("median" if percent == 50 else f"{percent:g} %", kld, kl.change.percentiles[percent])
        for percent, kld in kl.kld.percentiles.items()
    ]
    for name, kld, change in (
        ("maximum", kl.kld.maximum, kl.change.maximum), *middle,
        ("minimum", kl.kld.minimum, kl.change.minimum),
    ):  # fmt: skip
        rows.append((name, f"{kld:.6f}", f"{100 * change:.3f}"))
    columns = ("", "KL divergence", "change of probability, %")
    lines = [
        ("base", f"perplexity {kl.base.shown(4)} (files keep nothing below e^-16 of the best)"),
        ("ratio", f"{kl.ratio.shown(6)}, its logarithm {kl.log_ratio.shown(6)}"),
        ("difference", f"{kl.difference.shown(4)}, correlation {kl.correlation:.2%}"),
        ("change", f"{kl.rms.scaled(100).shown(3)} % of probability (root mean square)"),
        ("same top", f"{kl.same_top.scaled(100).shown(3)} %"),
    ]
    return f"{pairs(lines)}\n\n{table(rows, columns, right=','.join(columns[1:2]))}"
