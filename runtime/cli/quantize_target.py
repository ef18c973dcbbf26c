"""`runtime quantize --target`: types that are chosen by what is measured of the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runtime.cli.output import size, table
from runtime.cli.parsing import F, Refused, decorated, option

if TYPE_CHECKING:
    from runtime.cli.quantize import Words
    from runtime.quantise.choose import Wishes
    from runtime.quantise.target import Aimed

_TARGET = "Types by measurement"
_WINDOW, _CHUNKS = 256, 4  # tokens, and how many windows of them


def target_options(function: F) -> F:
    """--target and what says how it is measured."""
    return decorated(function, (
        option("--target", "In place of TYPE: bits per weight (4.5), the size of the file (3.2GB, "
               "600KiB, or bytes), or mean divergence from IN in nats (kld=0.01). Each tensor "
               "gets the type that serves this best by what its errors do to the predictions; that "
               "takes as long as reading the text some hundred times.", _TARGET, metavar="TARGET"),
        option("-f --file", "The text to measure on, UTF-8 (stories that come with the package).",
               _TARGET, metavar="FILE"),
        option("--chunks", f"How much of it: N windows of {_WINDOW} tokens ({_CHUNKS}).", _TARGET,
               type=click.IntRange(1), metavar="N"),
        option("--types", "Types to choose from (those with fast kernels).", _TARGET,
               metavar="TYPE,..."),
        option("--svg", "Draw the bits of each tensor, and what few would cost.", _TARGET,
               metavar="FILE"),
    ))  # fmt: skip


def check_no_target(options: dict[str, Any]) -> None:
    """UsageError for what has a meaning with --target alone."""
    for name in ("file", "chunks", "types", "svg"):
        if options[name] is not None:
            raise Refused(f"--{name} has no meaning without --target")


def aimed(
    words: Words, wishes: Wishes, imatrix: str | None, allow_requantize: bool,
    threads: int | None, options: dict[str, Any],
) -> Aimed:  # fmt: skip
    """What `--target` and its like ask for."""
    from runtime.cli.perplexity import measured_text
    from runtime.gguf.reader import open_gguf
    from runtime.outputs import check_outputs, write_text
    from runtime.quantise.collect import windows
    from runtime.quantise.target import Target, aim
    from runtime.text.tokenizer import Tokenizer

    target = Target.of(options["target"])
    kinds = [name.strip() for name in (options["types"] or "").split(",") if name.strip()]
    if options["types"] is not None and not kinds:
        raise Refused("--types names none: give some, such as q4_k,q8_0")
    file = open_gguf(words.source)
    read = options["file"], imatrix, options["tensor_type_file"]
    check_outputs([words.target, options["svg"]], [*file.paths, *read])
    tokenizer = Tokenizer.from_gguf(file)
    found = windows(tokenizer, measured_text(options["file"]), _WINDOW)
    found = found[: options["chunks"] or _CHUNKS]
    if not found:
        raise Refused(f"the text is shorter than {_WINDOW} tokens: give a longer one with -f")
    result = aim(
        words.source, target, found, wishes, imatrix, allow_requantize,
        kinds, threads, True, Path(words.target or ".").parent,
    )  # fmt: skip
    if options["svg"]:
        from runtime.report.mix_svg import draw

        write_text(options["svg"], draw(result))
    return result


def report(found: Aimed) -> str:
    """A row for each tensor whose type was chosen: what it got, and what that and less cost."""
    from runtime.quantise.target import bits

    rows = []
    for name, got in found.chosen.items():
        less_bytes = [o for o in found.options[name] if o.nbytes < got.nbytes]
        smaller = max(less_bytes, default=None, key=lambda o: o.nbytes)
        less = "" if smaller is None else f"{smaller.cost:.2e} {smaller.dtype}"
        rows.append([name, str(got.dtype), f"{bits(got.dtype):.2f}", size(got.nbytes),
                     f"{got.cost:.2e}", less])  # fmt: skip
    header = ("tensor", "type", "bits", "size", "divergence", "with the next smaller")
    text = table(rows, header, right="bits,size,divergence")
    return f"{text}\n\nexpected divergence from the source: {found.predicted:.4g} nats per token"
