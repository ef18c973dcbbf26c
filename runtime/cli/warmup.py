"""`runtime warmup`: compile a model's kernels before they are needed."""

from __future__ import annotations

import time
from typing import Any

import click

from runtime.cli.model_path import load, model_argument, model_option
from runtime.cli.options import load_arguments, model_options
from runtime.cli.parsing import Command


@click.command(
    "warmup",
    cls=Command,
    epilog="""\b
Examples:
  runtime warmup                the bundled model's kernels
  runtime warmup model.gguf
  RUNTIME_CPU_ISA=avx2 runtime warmup model.gguf
""",
)
@click.argument("model", required=False)
@model_option
@model_options
def command(model: str | None, model_option: str | None, **options: Any) -> None:
    """Compile the kernels a model needs and keep them in the cache folder.

    Kernels depend on the types in the file and on the processor, not on the model itself: what
    is compiled for one model serves all models of the same types. Without this, the first run
    does it.
    """
    from runtime.backends.environment import cache_dir

    started = time.perf_counter()
    loaded = load(model_argument(model, model_option), **load_arguments(options))
    try:
        loaded.warmup(progress=True)
    finally:
        loaded.close()
    click.echo(f"kernels ready in {time.perf_counter() - started:.1f} s, kept in {cache_dir()}")
