"""`runtime imatrix`: what weights are multiplied with, for a quantiser to weigh its errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runtime.cli.model_path import load, model_argument, model_option
from runtime.cli.options import load_arguments, precision_options
from runtime.cli.output import note, table
from runtime.cli.parsing import THREADS, Command, Refused, option
from runtime.cli.perplexity import measured_text

if TYPE_CHECKING:
    from runtime.quantise.imatrix_file import Imatrix

_TEXT, _FILE = "Text", "Importance matrix"


@click.command(
    "imatrix",
    cls=Command,
    epilog="""\b
Examples:
  runtime imatrix model.gguf -f text.txt -o imatrix.gguf
  runtime imatrix model.gguf -f text.txt -f code.txt --chunks 100 -o imatrix.gguf
  runtime imatrix --in-file a.gguf --in-file b.gguf -o both.gguf
  runtime imatrix --in-file imatrix.gguf --show-statistics
""",
)
@click.argument("model", required=False)
@model_option
@option("-f --file files", "Text to run the model on, UTF-8; - is stdin. May be repeated.", _TEXT,
        multiple=True, metavar="FILE")  # fmt: skip
@option("-c --context | --ctx-size", "Tokens of a window; each is a text of its own.", _TEXT,
        type=click.IntRange(1), default=512, show_default=True, metavar="N")  # fmt: skip
@option("--chunks", "Most windows to evaluate (all).", _TEXT, type=click.IntRange(-1), default=-1,
        metavar="N")  # fmt: skip
@option("--from-chunk skipped | --chunk", "Leave out the first N windows (0).", _TEXT,
        type=click.IntRange(0), default=0, metavar="N")  # fmt: skip
@option("--parse-special", "Control tokens written in the text are such.", _TEXT, is_flag=True)
@option("-o --output | --output-file", "The file to write. An existing one is replaced once the "
        "new one is whole, unless it is the model or a text.", _FILE, default="imatrix.gguf",
        show_default=True, metavar="FILE")  # fmt: skip
@option("--output-format", "gguf, or dat: the older one, with means of squares alone.", _FILE,
        type=click.Choice(["gguf", "dat"]), default="gguf", show_default=True)  # fmt: skip
@option("--output-frequency | -ofreq", "Write the file after every N windows too, so that Ctrl-C "
        "keeps them; 0 at the end alone.", _FILE, type=click.IntRange(0), default=10,
        show_default=True, metavar="N")  # fmt: skip
@option("--process-output", "Include the weight that makes the logits.", _FILE, is_flag=True)
@option("--in-file in_files", "Importance matrix to add to. May be repeated.", _FILE,
        multiple=True, metavar="FILE")  # fmt: skip
@option("--show-statistics", "Print a table of the importance matrix; it is written only where "
        "there is a text.", _FILE, is_flag=True)  # fmt: skip
@option("-t --threads", "Threads (default: one per core).", "Model", type=THREADS,
        metavar="N")  # fmt: skip
@precision_options
def command(
    model: str | None, model_option: str | None, files: Sequence[str], in_files: Sequence[str],
    output: str, show_statistics: bool, **options: Any,
) -> None:  # fmt: skip
    """Collect an importance matrix: of each weight's input, the sum of the squares in each column.

    `runtime quantize --imatrix FILE` rounds weights so that errors are small where inputs are
    large. The file is llama-imatrix's, and either program reads what the other writes.
    """
    from dataclasses import replace

    from runtime.outputs import check_outputs
    from runtime.quantise.collect import merged
    from runtime.quantise.imatrix_file import read, write, write_dat

    if not files and not in_files:
        raise click.UsageError("there is nothing to collect: give a text (-f) or --in-file")
    writes = bool(files) or not show_statistics
    if writes:
        check_outputs([output], files)
    before = [(path, read(path)) for path in in_files]
    window, every = options["context"], options["output_frequency"]

    def save(*found: Imatrix) -> Imatrix:
        of_texts = [(output, replace(each, datasets=files)) for each in found]
        total = merged([*before, *of_texts], window)
        if writes:
            (write if options["output_format"] == "gguf" else write_dat)(output, total)
        return total

    saved, total = 0, None
    try:
        for done, last, so_far in _collected(
            model_argument(model, model_option), files, before, output, options
        ):
            if last or (every and done - saved >= every):
                saved, total = done, save(so_far())
    except KeyboardInterrupt:
        kept = f"has the first {saved} windows" if saved else "was not written"
        note(f"stopped: {output} {kept}")
        raise
    total = total or save()
    if show_statistics:
        click.echo(_table(total))
    if writes:
        note(f"{output}: {len(total.entries)} weights, {total.chunks} windows")
    _note_missing(total)


def _collected(
    model: str | None, files: Sequence[str], before: Sequence[tuple[str, Imatrix]], output: str,
    options: dict[str, Any],
) -> Iterator[tuple[int, bool, Callable[[], Imatrix]]]:  # fmt: skip
    """Windows done, whether that is all, and what was collected so far; nothing without files.

    before, output: files that are read and written; they have to fit the model.
    """
    from runtime.outputs import check_outputs
    from runtime.progress import reporter
    from runtime.quantise.collect import collect, sequences, windows
    from runtime.quantise.job import importance_of

    if not files:
        return
    if options["chunks"] == 0:
        raise Refused("--chunks 0 leaves no window; give 1 or more, or -1 for all")
    size, texts = options["context"], [measured_text(file) for file in files]
    arguments = load_arguments(options) | {"sequences": sequences(size)}
    with load(model, **arguments) as loaded, reporter(True) as report:
        check_outputs([output], loaded.file.paths)
        for path, imatrix in before:
            importance_of(loaded.file, Path(path), imatrix)
            if absent := [name for name in imatrix.entries if name not in loaded.file.tensors]:
                raise Refused(
                    f"{path}: this importance matrix is of another model: {absent[0]} is not in "
                    f"{loaded.file.path}"
                )
        each = [windows(loaded.tokenizer, text, size, options["parse_special"]) for text in texts]
        every, skipped = [window for of_text in each for window in of_text], options["skipped"]
        if not every:
            raise Refused(
                f"{', '.join(files)}: shorter than a window of {size} tokens; give a longer text, "
                "or a smaller -c"
            )
        if skipped >= len(every):
            raise Refused(f"--from-chunk {skipped} leaves none of the {len(every)} windows")
        found = every[skipped:] if options["chunks"] < 0 else every[skipped:][: options["chunks"]]
        for done, so_far in collect(loaded, found, options["process_output"]):
            if report is not None:
                report(done, len(found), "collecting")
            yield done, done == len(found), so_far


def _note_missing(imatrix: Imatrix) -> None:
    """Say which experts saw nothing: they are quantised as without an importance matrix."""
    for name, entry in imatrix.entries.items():
        unseen = int((entry.counts == 0).sum())
        if unseen:
            note(f"{name}: {unseen} of {len(entry.counts)} matrices saw nothing; give more text")


def _table(imatrix: Imatrix) -> str:
    """A row for each weight, by layers."""
    from runtime.quantise.statistics import SCHEMA, layer

    shown = {
        "mean": "mean", "deviation": "std_deviation", "skewness": "skewness",
        "kurtosis": "kurtosis", "entropy %": "h_norm", "sum of squares": "sum_sq", "gain": "gain",
        "distance": "l2_dist", "cosine": "cossim", "pearson": "pearson", "covariance": "covariance",
    }  # fmt: skip
    rows = []
    for name, entry in sorted(
        imatrix.entries.items(), key=lambda item: (layer(item[0]) is None, layer(item[0]), item[0])
    ):
        assert entry.stats is not None, "what was merged has statistics"
        values = dict(zip(SCHEMA, entry.stats, strict=True))
        cells = [f"{values[key]:.4g}".replace("nan", "") for key in shown.values()]
        rows.append([name, f"{entry.counts.sum():.0f}", *cells])
    return table(rows, ["weight", "rows", *shown], ",".join(["rows", *shown]))
