"""`runtime warmup`: compile a model's kernels before they are needed."""

from __future__ import annotations

import time
from typing import Any

import click

from runtime.cli.model_path import load, model_argument, model_option
from runtime.cli.options import kv_type, load_arguments, model_options
from runtime.cli.parsing import Command


@click.command(
    "warmup",
    cls=Command,
    epilog="""\b
Examples:
  runtime warmup                the bundled model's kernels
  runtime warmup model.gguf
  RUNTIME_CPU_ISA=avx2 runtime warmup model.gguf
  runtime warmup --devices cuda:sm_90a              all kernels of a GPU that is not here
  runtime warmup model.gguf --devices cuda:sm_90a   those of a model
""",
)
@click.argument("model", required=False)
@model_option
@model_options
def command(model: str | None, model_option: str | None, **options: Any) -> None:
    """Compile the kernels a model needs and keep them in the cache folder.

    Kernels depend on the types in the file and on the processor, not on the model itself: what
    is compiled for one model serves all models of the same types. Without this, the first run
    does it. With --devices cuda:TARGET (sm_80, sm_90a, ...; several with commas) they are those of
    a GPU that need not be here, of all models where none is given.
    """
    from runtime.backends.environment import cache_dir
    from runtime.warming import targets_of

    started = time.perf_counter()
    if targets := targets_of(options["devices"]):
        _fill(targets, model_argument(model, model_option), options)
        return
    loaded = load(model_argument(model, model_option), **load_arguments(options))
    try:
        loaded.warmup(progress=True)
    finally:
        loaded.close()
    click.echo(f"kernels ready in {time.perf_counter() - started:.1f} s, kept in {cache_dir()}")


def _fill(targets: list[str], model: str | None, options: dict[str, Any]) -> None:
    from runtime import warming
    from runtime.arguments import kv_types
    from runtime.backends.environment import cache_dir
    from runtime.gguf.reader import open_gguf
    from runtime.progress import reporter

    kernels = warming.every_kernel()
    if model is not None:
        given = kv_types(kv_type(options)), options["activations"], options["cache_rotation"]
        kernels = warming.kernels_of(open_gguf(model), *given)
    for target in targets:
        started = time.perf_counter()
        with reporter(True) as progress:
            compiled = warming.fill(target, kernels, progress)
        click.echo(
            f"{target}: {len(kernels)} kernels ready in {time.perf_counter() - started:.1f} s, "
            f"{compiled} of them compiled, kept in {cache_dir()}"
        )
