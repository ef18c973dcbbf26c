"""`runtime convert`: a Hugging Face checkpoint as a GGUF file."""

from __future__ import annotations

import time

import click

from runtime.cli.output import note, size
from runtime.cli.parsing import Command, option

OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0")


@click.command(
    "convert",
    cls=Command,
    epilog="""\b
Examples:
  runtime convert Qwen3-0.6B/ qwen3.gguf
  runtime convert Qwen3-0.6B/ qwen3-q8_0.gguf --outtype q8_0
""",
)
@click.argument("folder")
@click.argument("out", metavar="OUT.gguf")
@option(
    "--outtype", "Type of most matrices; auto is the checkpoint's.", "Options",
    type=click.Choice(OUTTYPES, case_sensitive=False), default="auto",
    show_default=True,
)  # fmt: skip
@option(
    "--no-mtp |--no-nextn", "Leave out blocks that predict further tokens.", "Options",
    is_flag=True,
)  # fmt: skip
def command(folder: str, out: str, outtype: str, no_mtp: bool) -> None:
    """Write the Hugging Face checkpoint in FOLDER as a GGUF file.

    FOLDER has config.json, tokenizer.json and safetensors files in it. The new file is what
    llama.cpp's converter makes of them. No more than a piece of a tensor is in memory at a time.
    An existing OUT.gguf is replaced, once the new one is whole; a file of FOLDER is not.
    """
    from runtime.conversion.convert import convert
    from runtime.gguf.reader import open_gguf

    started = time.perf_counter()
    try:
        file = open_gguf(convert(folder, out, outtype, mtp=not no_mtp, progress=True))
    except KeyboardInterrupt:
        note(f"stopped: {out} was not written")
        raise
    click.echo(
        f"{file.path}: {file.architecture}, {file.get('general.size_label')}, "
        f"{len(file.tensors)} tensors, {size(file.nbytes)}, "
        f"in {time.perf_counter() - started:.1f} s"
    )
