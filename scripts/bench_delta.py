"""Speed of delta-net layers alone: state traffic of decoding, tokens per second of prompts.

    python scripts/bench_delta.py [--threads N] [--heads 16] [--dim 128] [--layers 200]

A layer is the short convolution with its norms, and the recurrence. In a decode step that many
layers read and write states of their own, far more than caches hold; the figure is what they read
and write, and its ratio to the read bandwidth measured in the same run. Each time is the best of
several runs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed

from runtime import ops
from runtime.backends.cpu import CpuBackend
from runtime.backends.cpu.run.bandwidth import read_bandwidth
from runtime.backends.cpu.run.cores import physical_cores
from runtime.ops.dtypes import F32
from runtime.ops.tensor import Tensor

TAPS, EPS, RUNS = 4, 1e-6, 20


def layer(n: int, tokens: int, heads: int, dim: int) -> Tensor:
    """Layer n of a step of one sequence, as a model file writes it."""
    size = heads * dim
    x = ops.step_input("x", (tokens, 3 * size), F32)
    gates = ops.step_input("gates", (tokens, 2 * heads), F32)
    step = [ops.step_input("spans", (1, 2)), *(ops.step_input(s, (1,)) for s in ("from", "to"))]
    conv = ops.state(f"conv.{n}", (1, TAPS - 1, 3 * size), F32, "slots")
    state = ops.state(f"delta.{n}", (1, heads, dim, dim), F32, "slots")
    filters = ops.weight("filters", (3 * size, TAPS), F32)
    y = ops.silu(ops.short_conv(x, filters, conv, *step))
    parts = [ops.slice_(y, axis=1, start=i * size, stop=(i + 1) * size) for i in range(3)]
    q, k, v = (ops.split_heads(part, heads) for part in parts)
    q, k = ops.l2_norm(q, eps=EPS), ops.l2_norm(k, eps=EPS)
    alpha, b = (ops.slice_(gates, axis=1, start=i * heads, stop=(i + 1) * heads) for i in (0, 1))
    decay, beta = ops.mul(ops.softplus(alpha), ops.weight("a", (heads,), F32)), ops.sigmoid(b)
    return ops.gated_delta(q, k, v, decay, beta, state, *step, scale=dim**-0.5, order="grouped")


def seconds(layers: int, tokens: int, heads: int, dim: int, threads: int) -> dict[str, float]:
    """The best time of each kernel for one layer, in a step of some layers of the same input."""
    rng = np.random.default_rng(0)
    values = {"filters": rng.standard_normal((3 * heads * dim, TAPS)), "a": -rng.random(heads)}
    stored = {
        name: SimpleNamespace(
            dtype=F32, nbytes=4 * x.size, data=x.astype(np.float32).view(np.uint8)
        )
        for name, x in values.items()
    }
    file = SimpleNamespace(tensors=stored)
    graph = ops.Graph(tuple(layer(n, tokens, heads, dim) for n in range(layers)))
    inputs = {
        "x": rng.standard_normal((tokens, 3 * heads * dim)).astype(np.float32),
        "gates": rng.standard_normal((tokens, 2 * heads)).astype(np.float32),
        "spans": np.array([[0, tokens]], np.int32),
        **{name: np.zeros(1, np.int32) for name in ("from", "to")},
    }
    backend = CpuBackend(file, threads)
    program = backend.program(graph)
    names = [row.calls[0].kernel.name for row in program.plan.instructions]
    times = np.min([program.profile(inputs, {})[1] for _ in range(RUNS)], 0)
    backend.close()
    found = dict.fromkeys(names, 0.0)
    for name, ns in zip(names, times, strict=True):
        found[name] += float(ns) * 1e-9 / layers
    return found


@click.command(help=__doc__)
@click.option("--threads", type=int, default=None, help="default: physical cores")
@click.option("--heads", default=16, help="key heads and value heads")
@click.option("--dim", default=128, help="of keys and values")
@click.option("--layers", default=200, help="of a decode step")
@click.option("--tokens", default=512, help="of a prompt")
def main(threads: int | None, heads: int, dim: int, layers: int, tokens: int) -> None:
    threads = threads or physical_cores()
    bandwidth, work = read_bandwidth(threads), 7 * heads * dim * dim
    table = Table("step", "convolution us", "recurrence us", "state GB/s", "ratio", "GFLOP/s")
    table.title = f"one layer, {threads} threads; memory {bandwidth / 1e9:.1f} GB/s"
    for count, n in ((1, layers), (tokens, 1)):
        found = seconds(n, count, heads, dim, threads)
        conv, delta = found["conv_post"], found["gated_delta"]
        moved = 2 * 4 * heads * dim * dim / delta
        state = (f"{moved / 1e9:.1f}", f"{moved / bandwidth:.2f}") if count == 1 else ("-", "-")
        times = (f"{conv * 1e6:.1f}", f"{delta * 1e6:.1f}")
        table.add_row(f"{count} tokens", *times, *state, f"{work * count / delta / 1e9:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
