"""What caches of each type lose by the block size of their rotation: mean KLD against an f32 cache.

    python scripts/cache_quality.py [MODEL] [-f TEXT] --types q8_0,q4_0 --blocks 0,16,32,64

K and V are also measured apart: the other one stays in float32. Block 0 is no rotation.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import click

sys.path.append(str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed

import runtime
from runtime.backends.passes import rotate_cache
from runtime.ops.kv_formats import KV_FORMATS
from runtime.ops.tensor import Tensor
from runtime.quality.windows import bundled_text

QUANTISED = ",".join(name for name, row in KV_FORMATS.items() if row.shared)


@click.command(help=__doc__.splitlines()[0])
@click.argument("path", required=False)
@click.option("-f", "--file", type=Path, help="Text (default: the bundled one).")
@click.option("--types", default=QUANTISED, show_default=True)
@click.option("--blocks", default="0,16,32,64,128,256", show_default=True)
@click.option("--windows", type=int, help="Windows of 512 tokens, at most.")
def main(path: str | None, file: Path | None, types: str, blocks: str, windows: int | None) -> None:
    text = file.read_text() if file else bundled_text()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        with loaded(path, "f32") as model:
            model.perplexity(text, windows=windows, kl_base=base)
        for kind in types.split(","):
            for block in map(int, blocks.split(",")):
                rotate_cache.rotation_block = always(block)
                for which, kinds in (("K", f"{kind},f32"), ("V", f"f32,{kind}"), ("both", kind)):
                    with loaded(path, kinds) as model:
                        kld = model.perplexity(kl=base).kl.kld.mean
                    found = f"{kld.value:.3e} +- {kld.error:.0e}"
                    click.echo(f"{kind:7} block {block:<3} {which:4} {found}")


def always(block: int) -> Callable[[Tensor], int]:
    """The rule that takes this block whatever the head size is."""
    return lambda pages: block if pages.dtype.block > 1 else 0


def loaded(path: str | None, kinds: str) -> runtime.Model:
    """The model with caches of these types, where nothing else is rounded to few bits."""
    return runtime.load(
        path, kv_type=kinds, context=512, sequences=1, activations="f32", progress=False
    )


if __name__ == "__main__":
    main()
