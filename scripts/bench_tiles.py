"""Speed of the matmul kernels alone: GMAC/s for prompts, GB/s of packed weights for decoding.

    python scripts/bench_tiles.py [--threads N] [--isa NAME] [--formats Q4_0,Q8_0] [--tokens 512]

Weights and activations are arbitrary; each figure is the best of several runs. The last column is
the share of the read bandwidth measured in the same run, as are the raw rates of the processor's
units that stand above: what loops of one instruction reach.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed


from runtime.backends.cpu.compile import isa, objects
from runtime.backends.cpu.run.bandwidth import read_bandwidth
from runtime.backends.cpu.run.cores import physical_cores
from runtime.backends.cpu.run.raw_rates import raw_rates
from runtime.backends.cpu.tile.emit import emit_matmul
from runtime.backends.cpu.tile.formats import NAMES as FORMATS
from runtime.backends.cpu.tile.formats import format_of, packed_nbytes
from runtime.backends.cpu.tile.spec import TileSpec, activation_tile_nbytes

SHAPE = (3072, 1024)  # rows and columns of the weights of a prompt
DECODE_BYTES = 100 << 20  # weights of a decode step: far more than caches hold
HALF_ONE = 0x3C  # a byte that makes neither denormal nor huge float16 scales


@dataclass(frozen=True)
class Machine:
    """Where the kernels run."""

    isa_name: str
    n_threads: int
    pool: ThreadPoolExecutor

    def seconds(self, spec: TileSpec, shape: tuple[int, int, int], repeats: int = 7) -> float:
        """The best time of one matmul of (tokens, rows, inner)."""
        n_tokens, n_rows, n_inner = shape
        ir = emit_matmul(spec, self.isa_name)
        kernel = objects.function(objects.load_object(objects.compile_ir(ir, self.isa_name)))
        weights = _filled(packed_nbytes(spec.format, n_rows, n_inner))
        tile = activation_tile_nbytes(spec.columns, spec.coding, n_inner)
        x = _filled(-(-n_tokens // spec.columns) * tile)
        out, live = _filled(4 * n_tokens * n_rows), np.array([n_tokens], np.int64)
        args = [weights.ctypes.data, x.ctypes.data, out.ctypes.data, n_rows, 0, 0, 0]
        return self.best(kernel, [*args, live.ctypes.data, n_rows, n_inner], repeats)

    def best(self, kernel: Any, args: list[int], repeats: int = 7) -> float:
        """The best time of one call of a kernel on all threads."""
        table = np.array(args, np.int64)
        return min(self._once(kernel, table.ctypes.data) for _ in range(repeats))

    def _once(self, kernel: Any, args: int) -> float:
        start = time.perf_counter()
        list(self.pool.map(lambda i: kernel(args, i, self.n_threads), range(self.n_threads)))
        return time.perf_counter() - start


def _filled(n_bytes: int) -> np.ndarray:
    """n_bytes at a 64-byte boundary."""
    raw = np.full(n_bytes + 64, HALF_ONE, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + n_bytes]


def prompt_specs(name: str, isa_name: str) -> list[TileSpec]:
    """The kernels that prompts can use."""
    kind = "f32" if format_of(name).is_float else "int8"
    specs = [TileSpec(name, columns, kind) for columns in (4, 8)]
    if isa_name == "amx" and (kind == "int8" or name == "BF16"):
        specs.append(TileSpec(name, 16, "int8" if kind == "int8" else "split"))
    return specs


def _row(machine: Machine, name: str, n_tokens: int, bandwidth: float) -> list[str]:
    n_rows, n_inner = SHAPE
    figures = []
    for spec in prompt_specs(name, machine.isa_name):
        seconds = machine.seconds(spec, (n_tokens, n_rows, n_inner))
        figures.append(f"{n_tokens * n_rows * n_inner / seconds / 1e9:.0f}")
    kind = "f32" if format_of(name).is_float else "int8"
    rows = DECODE_BYTES // packed_nbytes(name, 16, n_inner) * 16
    seconds = machine.seconds(TileSpec(name, 1, kind), (1, rows, n_inner))
    speed = packed_nbytes(name, rows, n_inner) / seconds
    return [
        name,
        *figures,
        *["-"] * (3 - len(figures)),
        f"{speed / 1e9:.1f}",
        f"{speed / bandwidth:.2f}",
    ]


@click.command(help=__doc__)
@click.option("--threads", type=int, default=None, help="default: physical cores")
@click.option("--isa", "isa_name", default=None, help="default: the one that would be used")
@click.option("--formats", default=",".join(FORMATS), help="comma-separated")
@click.option("--tokens", default=512, help="of the prompt")
def main(threads: int | None, isa_name: str | None, formats: str, tokens: int) -> None:
    n_threads, isa_name = threads or physical_cores(), isa_name or isa.selected()
    bandwidth = read_bandwidth(n_threads)
    columns = ("format", "4 columns", "8 columns", "16 columns", "decode GB/s", "of bandwidth")
    with ThreadPoolExecutor(n_threads) as pool:
        machine = Machine(isa_name, n_threads, pool)
        raw = raw_rates(isa_name, lambda kernel: machine.best(kernel, [0]))
        units = ", ".join(f"{name} {n_threads * rate / 1e9:.0f}" for name, rate in raw.items())
        title = f"{isa_name}, {n_threads} threads, GMAC/s; memory {bandwidth / 1e9:.1f} GB/s"
        table = Table(*columns, title=f"{title}\nraw: {units}")
        for name in formats.split(","):
            table.add_row(*_row(machine, name, tokens, bandwidth))
    Console().print(table)


if __name__ == "__main__":
    main()
