"""`runtime quantize`: write a model's file with weights of another type."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from runtime.cli.output import note, size, table
from runtime.cli.parsing import Command, option
from runtime.cli.quantize_target import aimed, report, target_options

if TYPE_CHECKING:
    from runtime.quantise.choose import Choice, Wishes
    from runtime.quantise.job import Job


class Words(NamedTuple):
    """What the command line says without options."""

    source: str
    target: str | None
    type: str
    threads: int | None = None


@click.command(
    "quantize",
    cls=Command,
    epilog="""\b
Examples:
  runtime quantize model-F16.gguf model-Q4_K_M.gguf Q4_K_M
  runtime quantize model-F16.gguf Q4_K_M --dry-run          types and sizes, nothing is written
  runtime quantize in.gguf out.gguf IQ3_M --imatrix model.imatrix.gguf
  runtime quantize in.gguf out.gguf --target 4.5            the best mix of 4.5 bits per weight
  runtime quantize in.gguf out.gguf Q4_0 --tensor-type 'ffn_down=Q6_K' --tensor-type 'attn_v=Q8_0'
""",
)
@click.argument("words", nargs=-1, required=True, metavar="IN [OUT] TYPE")
@option("--imatrix", "Importance matrix, as runtime imatrix or llama-imatrix writes it: errors in "
        "columns that matter more weigh more.", "Options", metavar="FILE")  # fmt: skip
@option("--dry-run", "Only show the table of tensors, types and sizes.", "Options", is_flag=True)
@option("-t --threads", "Threads (one per core).", "Options", type=click.IntRange(1), metavar="N")
@option("--allow-requantize", "Also read weights that are quantised already; that costs quality.",
        "Options", is_flag=True)  # fmt: skip
@option("--tensor-type", "TYPE for the tensors in whose names a pattern (a regular expression) is "
        "found. May be repeated; the first that is found counts.", "Types", multiple=True,
        metavar="PATTERN=TYPE")  # fmt: skip
@option("--tensor-type-file", "A file of such pairs.", "Types", metavar="FILE")
@option("--output-tensor-type", "TYPE of output.weight.", "Types", metavar="TYPE")
@option("--token-embedding-type", "TYPE of token_embd.weight.", "Types", metavar="TYPE")
@option("--leave-output-tensor", "Keep output.weight as it is.", "Types", is_flag=True)
@option("--pure", "One type for all matrices, without the mix.", "Types", is_flag=True)
@target_options
def command(
    words: tuple[str, ...], imatrix: str | None, dry_run: bool, threads: int | None,
    allow_requantize: bool, **more: Any,
) -> None:  # fmt: skip
    """Write the model IN to OUT with weights of TYPE: Q4_K_M, Q8_0, IQ4_XS, F16, ...

    Types and mixes are those of llama-quantize, tensor by tensor; COPY keeps all. Where rows are
    no whole number of a type's blocks another takes its place, which the table says. Memory does
    not grow with the file.
    """
    from runtime.quantise.job import plan

    found, wishes = _parsed(words, more["target"]), _wishes(more)
    if more["target"]:
        aim = aimed(found, wishes, imatrix, allow_requantize, threads, more)
        click.echo(report(aim))
        job = aim.job
    else:
        job = plan(found.source, found.type, wishes, imatrix, allow_requantize, dry_run)
    for line in job.notes:
        note(line)
    if dry_run:
        click.echo(f"{_table(job)}\n\n{_total(job)}")
        return
    target = found.target or _beside(found.source, found.type)
    started = time.perf_counter()
    try:
        job.write(target, threads or found.threads)
    except KeyboardInterrupt:
        note(f"stopped: {target} was not written")
        raise
    click.echo(f"{_by_type(job)}\n\n{_total(job)}")
    note(f"{target}: written in {time.perf_counter() - started:.1f} s")


def _parsed(words: Sequence[str], target: str | None) -> Words:
    """IN OUT TYPE, or as llama-quantize also takes it: without OUT, with a number of threads.

    With a target in place of TYPE: IN OUT.
    """
    if target:
        if len(words) != 2:
            raise click.UsageError("give IN OUT: --target takes the place of a type")
        return Words(words[0], words[1], "")
    first, rest = words[0], list(words[1:])
    threads = (
        int(rest.pop()) if len(rest) > 1 and rest[-1].isdecimal() and _is_type(rest[-2]) else 0
    )
    if len(rest) == 1 and _is_type(rest[0]):
        return Words(first, None, rest[0], threads or None)
    if len(rest) != 2:
        raise click.UsageError(
            "give IN OUT TYPE: the file that is read, the one that is written, and a type such as "
            "Q4_K_M"
        )
    return Words(first, rest[0], rest[1], threads)


def _is_type(word: str) -> bool:
    from runtime.errors import OptionError
    from runtime.quantise.mixes import mix_of

    try:
        return word.upper() == "COPY" or bool(mix_of(word))
    except OptionError:
        return False


def _beside(source: str, type: str) -> str:
    return str(Path(source).with_name(f"ggml-model-{type.upper()}.gguf"))


def _wishes(types: dict[str, Any]) -> Wishes:
    from runtime.quantise.choose import Wishes

    pairs = list(types["tensor_type"])
    if types["tensor_type_file"]:
        pairs += Path(types["tensor_type_file"]).read_text(encoding="utf-8").split()
    tensors = []
    for pair in pairs:
        pattern, _, dtype = pair.partition("=")
        if not pattern or not dtype:
            raise click.UsageError(f"--tensor-type {pair!r}: give PATTERN=TYPE, as attn_v=Q8_0")
        tensors.append((pattern, dtype))
    return Wishes(
        tensors, types["output_tensor_type"], types["token_embedding_type"], types["pure"],
        types["leave_output_tensor"],
    )  # fmt: skip


def _table(job: Job) -> str:
    rows = [
        (c.name, " x ".join(map(str, c.shape)), str(job.file.tensors[c.name].dtype), _said(c),
         size(c.nbytes))
        for c in job.choices
    ]  # fmt: skip
    return table(rows, ("tensor", "shape", "from", "to", "size"), right="size")


def _by_type(job: Job) -> str:
    """Tensors and bytes by type, with what took the place of another."""
    nbytes, counts = Counter[str](), Counter[str]()
    for c in job.choices:
        counts[_said(c)] += 1
        nbytes[_said(c)] += c.nbytes
    rows = [(key, str(counts[key]), size(n)) for key, n in nbytes.most_common()]
    return table(rows, ("type", "tensors", "size"), right="tensors,size")


def _said(choice: Choice) -> str:
    return str(choice.dtype) + (f" for {choice.wanted}" if choice.wanted else "")


def _total(job: Job) -> str:
    from runtime.cli.facts import n_params

    weights, before = n_params(job.file), job.file.tensors_nbytes
    return " -> ".join(
        f"{size(n)} ({8 * n / max(1, weights):.2f} bits per weight)" for n in (before, job.nbytes)
    )
