"""Speed as ratios against numpy and memory bandwidth in the same run, held to a baseline.

`baseline.json` has the ratios of each instruction set as they were measured; a run that falls
below `KEEP` of one in every one of ATTEMPTS is a regression. A busy neighbour takes a third of a
figure for minutes (seen), and numpy's own threads gain or lose as much, so half is the line. Write
it anew, on a quiet machine, with `UPDATE_BASELINE=1 pytest tests/benchmarks`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from stored_tensors import Stored, file_of

from runtime import ops
from runtime.backends.cpu import CpuBackend
from runtime.backends.cpu.compile import isa
from runtime.backends.cpu.compile.library import library
from runtime.backends.cpu.run.bandwidth import read_bandwidth
from runtime.backends.plan.kernel import Kernel
from runtime.ops.dtypes import DTYPES

BASELINE = Path(__file__).with_name("baseline.json")
KEEP = 0.5
ATTEMPTS = 8
THREADS = min(2, os.cpu_count() or 1)


def _weights(kind: str, rows: int, inner: int) -> SimpleNamespace:
    values = np.random.default_rng(0).standard_normal((64, inner)).astype(np.float32)
    raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    data = np.tile(raw.reshape(-1).view(np.uint8), rows // 64)
    return file_of({"w": Stored(values, data)})


def _matmul(kind: str, tokens: int, rows: int, inner: int) -> Callable[[], Any]:
    """A step that is one matmul of `tokens` rows."""
    x = ops.step_input("x", (ops.Dim("tokens", tokens), inner), DTYPES["f32"])
    w = ops.weight("w", (rows, inner), DTYPES[kind.lower()])
    backend = CpuBackend(_weights(kind, rows, inner), threads=THREADS)
    program = backend.program(ops.Graph((ops.matmul(x, w),)))
    inputs = {"x": np.random.default_rng(1).standard_normal((tokens, inner)).astype(np.float32)}
    return lambda: program.run(inputs, {"tokens": tokens})


def _best(work: Callable[[], Any], rounds: int = 7) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _numpy_seconds(tokens: int, rows: int, inner: int) -> float:
    a, b = (np.ones(shape, np.float32) for shape in ((tokens, inner), (inner, rows)))
    seconds = _best(lambda: a @ b)
    time.sleep(0.2)  # its threads spin on for a while and would take ours' processors
    return seconds


@cache
def _bandwidth() -> float:
    return read_bandwidth(THREADS, 256 << 20)


def hold(
    benchmark: Any, name: str, work: Callable[[], Any], ratio: Callable[[float], float]
) -> None:
    """Time `work`; fail when `ratio(seconds)` is below KEEP of this instruction set's baseline."""
    known = json.loads(BASELINE.read_text(encoding="utf-8")) if BASELINE.exists() else {}
    benchmark.pedantic(work, rounds=7, warmup_rounds=1)
    found = ratio(benchmark.stats.stats.min)
    if os.environ.get("UPDATE_BASELINE"):
        known.setdefault(isa.selected(), {})[name] = round(found, 3)
        text = json.dumps(known, indent=1, sort_keys=True, ensure_ascii=False)
        BASELINE.write_text(text + "\n", encoding="utf-8")
        return
    want = known.get(isa.selected(), {}).get(name)
    if want is None:
        pytest.skip(f"no baseline of {name} for {isa.selected()}")
    seen = [found]
    while max(seen) < KEEP * want and len(seen) < ATTEMPTS:
        time.sleep(len(seen))
        seen.append(ratio(_best(work)))
    assert max(seen) >= KEEP * want, f"{name}: ratios {seen}, baseline {want}, allowed {KEEP} of it"


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_prompt_matmul_against_numpy(benchmark: Any, kind: str):
    shape = (256, 2048, 1024)
    name = f"prompt matmul {kind} / numpy"
    hold(benchmark, name, _matmul(kind, *shape), lambda t: _numpy_seconds(*shape) / t)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_decode_matmul_against_bandwidth(benchmark: Any, kind: str):
    rows, inner = 65536, 1024
    nbytes = _weights(kind, rows, inner).tensors["w"].nbytes
    name = f"decode matmul {kind} / bandwidth"

    def ratio(seconds: float) -> float:
        """A large last-level cache may hold the weights: more than all of memory's is all."""
        return min(1.0, nbytes / seconds / _bandwidth())

    hold(benchmark, name, _matmul(kind, 1, rows, inner), ratio)


def test_attention_against_numpy(benchmark: Any):
    tokens, heads, kv_heads, dim = 256, 8, 4, 128
    t = ops.Dim("tokens", tokens)
    pages = (tokens // ops.PAGE, ops.PAGE, kv_heads, dim)
    k, v = (ops.state(name, pages, DTYPES["f16"]) for name in "kv")
    q = ops.step_input("q", (t, heads, dim), DTYPES["f32"])
    table = ops.step_input("table", (1, pages[0]))
    sequences, places = (ops.step_input(name, (t,)) for name in ("sequences", "places"))
    node = ops.attention(q, k, v, table, sequences, places, scale=dim**-0.5)
    program = CpuBackend(threads=THREADS).program(ops.Graph((node,)))
    inputs = {
        "q": np.ones((tokens, heads, dim), np.float32), "places": np.arange(tokens),
        "table": np.arange(pages[0])[None], "sequences": np.zeros(tokens, np.int32),
    }  # fmt: skip

    def ratio(seconds: float) -> float:
        """Causal attention computes half of two square products per head."""
        return heads * _numpy_seconds(tokens, tokens, dim) / seconds

    hold(benchmark, "attention / numpy", lambda: program.run(inputs, {"tokens": tokens}), ratio)


def test_cost_of_an_op(benchmark: Any):
    """Rows of the instruction table that do next to nothing: what a barrier costs."""
    count = 1000
    x = ops.step_input("x", (ops.Dim("tokens", 1), 16), DTYPES["f32"])
    node = x
    for i in range(count):
        node = ops.scale(node, factor=1.0 + i)
    program = CpuBackend(threads=THREADS).program(ops.Graph((node,)))
    inputs = {"x": np.ones((1, 16), np.float32)}
    work = lambda: program.run(inputs, {"tokens": 1})  # noqa: E731
    hold(benchmark, "0.3 µs / op", work, lambda t: 0.3e-6 / (t / count))


def test_warm_start_loads_and_never_compiles():
    """The kernels of this file are on disk by now: finding them is cheap."""
    seconds = _best(lambda: library().missing([Kernel.of("executor")]), 3)
    assert seconds < 0.05
