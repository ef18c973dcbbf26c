"""`runtime quantize`: write a model's file with weights of another type."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from runtime.cli.output import note, size, table
from runtime.cli.parsing import THREADS, Command, Refused, option
from runtime.cli.quantize_target import aimed, check_no_target, report, target_options

if TYPE_CHECKING:
    from runtime.quantise.choose import Choice, Wishes
    from runtime.quantise.job import Job


_ARGUMENTS = {  # in errors of `runtime.quantize`, and what is said here
    "allow_requantize=True": "--allow-requantize", "with imatrix=": "with --imatrix",
    "tensor_types: ": "--tensor-type ", "pure has no": "--pure has no",
    "leave_output_tensor and output_tensor_type": "--leave-output-tensor and --output-tensor-type",
}  # fmt: skip


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
@option("-t --threads", "Threads (one per core).", "Options", type=THREADS, metavar="N")
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
    """Write the model IN to OUT with weights of TYPE.

    Without OUT the file is ggml-model-TYPE.gguf beside IN. A file that is there already is
    replaced, once the new one is whole.

    Types and mixes are those of llama-quantize, tensor by tensor; COPY keeps all. Where rows are
    no whole number of a type's blocks another takes its place, which the table says. Memory does
    not grow with the file.

    TYPE: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q2_K_S, Q3_K_S, Q3_K_M, Q3_K_L,
    Q4_K_S, Q4_K_M, Q5_K_S, Q5_K_M, Q6_K, IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ2_M, IQ3_XXS,
    IQ3_XS, IQ3_S, IQ3_M, IQ4_NL, IQ4_XS, Q1_0, Q2_0, TQ1_0, TQ2_0, MXFP4_MOE, COPY.
    """
    from runtime.outputs import check_outputs
    from runtime.quantise.job import plan

    if more["target"] is None:
        check_no_target(more)
    found = _parsed(words, more["target"])
    read = found.source, imatrix, more["tensor_type_file"]
    check_outputs([found.target], read)
    target, wishes = found.target or _beside(found.source, found.type), _wishes(more)
    started = time.perf_counter()
    try:
        with _options_named():
            if more["target"] is not None:
                aim = aimed(found, wishes, imatrix, allow_requantize, threads, more)
                click.echo(report(aim))
                job = aim.job
            else:
                job = plan(found.source, found.type, wishes, imatrix, allow_requantize, dry_run)
            for line in job.notes:
                note(named(line))
            if dry_run:
                click.echo(f"{_table(job)}\n\n{_total(job)}")
                return
            check_outputs([target], read)
            job.write(target, threads or found.threads)
    except KeyboardInterrupt:
        note(f"stopped: {target} was not written")
        raise
    click.echo(f"{_by_type(job)}\n\n{_total(job)}")
    note(f"{target}: written in {time.perf_counter() - started:.1f} s")


@contextmanager
def _options_named() -> Iterator[None]:
    """Errors call arguments of `runtime.quantize` as the command line does."""
    from runtime.errors import Error

    try:
        yield
    except Error as error:
        raise type(error)(named(str(error))) from error


def named(text: str) -> str:
    """What is said of arguments of `runtime.quantize`, with the names of options."""
    for argument, name in _ARGUMENTS.items():
        text = text.replace(argument, name)
    return text


def _parsed(words: Sequence[str], target: str | None) -> Words:
    """IN OUT TYPE, or as llama-quantize also takes it: without OUT, with a number of threads.

    With a target in place of TYPE: IN OUT.
    """
    if target is not None:
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
    from runtime.quantise.mixes import MIXES

    numbers = {str(mix.file_type): name for name, mix in MIXES.items()}
    return str(Path(source).with_name(f"ggml-model-{numbers.get(type, type.upper())}.gguf"))


def _wishes(types: dict[str, Any]) -> Wishes:
    from runtime.quantise.choose import Wishes

    pairs = list(types["tensor_type"])
    if types["tensor_type_file"] is not None:
        pairs += _pairs_of(types["tensor_type_file"])
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


def _pairs_of(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").split()
    except UnicodeDecodeError:
        raise Refused(f"{path}: no text file, UTF-8, of PATTERN=TYPE pairs") from None


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
