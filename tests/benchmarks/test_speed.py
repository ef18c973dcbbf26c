"""Speed as ratios against loops of fixed instructions, timed in turn, held to a baseline.

Ours and the partner run A B A B on one thread, so that a busy neighbour, a slower clock or a full
cache meet both; the figure is the median of the paired ratios. `baseline.json` has it for each
instruction set and the processor it was measured on. There a test fails below KEEP of it in every
one of ATTEMPTS; another processor of the set has other ratios, and fails below ELSEWHERE. Write it
anew, on a quiet machine, with `UPDATE_BASELINE=1 pytest tests/benchmarks`.

Run without workers, pytest-benchmark times each work too, with the ratio beside it:
`pytest tests/benchmarks --benchmark-autosave`, and `--benchmark-compare` after a change.
"""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from partners import computing, reading
from stored_tensors import Stored, file_of

from runtime import ops
from runtime.backends.cpu import CpuBackend
from runtime.backends.cpu.compile import isa
from runtime.backends.cpu.compile.library import library
from runtime.backends.cpu.run.cores import cpu_name, shared_out
from runtime.backends.plan.kernel import Kernel
from runtime.ops.dtypes import DTYPES, F32

BASELINE = Path(__file__).with_name("baseline.json")
KEEP, ELSEWHERE = 0.85, 0.4
ATTEMPTS = 6
SECONDS = 0.6  # of one attempt
Work = Callable[[], Any]


def _processor() -> str:
    """What has the same ratios: several generations may share one name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    facts: dict[str, str] = {}
    for line in reversed(lines):
        key, _, value = line.partition(":")
        facts[key.strip()] = value.strip()
    more = [facts[key] for key in ("cpu family", "model", "stepping", "cache size") if key in facts]
    return " / ".join([cpu_name(), *more])


def _best(work: Work, rounds: int = 3) -> float:
    """Seconds, without what interrupts most of the rounds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def paired_ratio(work: Work, partner: Work, seconds: float = SECONDS) -> float:
    """The median of time(partner) / time(work) over pairs run in turn for that long."""
    ratios: list[float] = []
    end = time.perf_counter() + seconds
    while len(ratios) < 15 or time.perf_counter() < end:
        ours = _best(work)
        ratios.append(_best(partner) / ours)
    return float(np.median(ratios))


def hold(benchmark: Any, name: str, work: Work, partner: Work) -> None:
    """Time `work`; fail when beside `partner` it has become slower than the baseline allows."""
    benchmark.extra_info["ratio"] = _held(name, work, partner)
    benchmark.pedantic(work, rounds=7, warmup_rounds=1)


def _held(name: str, work: Work, partner: Work) -> float:
    """The ratio, of the attempt that was fast enough."""
    known = json.loads(BASELINE.read_text(encoding="utf-8"))
    for each in (work, partner):
        each()
    if os.environ.get("UPDATE_BASELINE"):
        rows = known.setdefault(isa.selected(), {})
        if rows.get("processor") != _processor():
            rows.clear()
        rows["processor"] = _processor()
        seen = [paired_ratio(work, partner) for _ in range(ATTEMPTS)]
        rows[name] = round(float(np.median(seen)), 3)
        text = json.dumps(known, indent=1, sort_keys=True, ensure_ascii=False)
        BASELINE.write_text(text + "\n", encoding="utf-8")
        return rows[name]
    rows = known.get(isa.selected(), {})
    least = rows.get(name, 0.0) * (KEEP if rows.get("processor") == _processor() else ELSEWHERE)
    seen = []
    for attempt in range(ATTEMPTS):
        time.sleep(attempt)
        seen.append(paired_ratio(work, partner))
        if seen[-1] >= least:
            return seen[-1]
    pytest.fail(f"{name}: ratios {np.round(seen, 3)}, at least {least:.3f} wanted")


def _weights(kind: str, rows: int, inner: int) -> SimpleNamespace:
    values = np.random.default_rng(0).standard_normal((64, inner)).astype(np.float32)
    raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    data = np.tile(raw.reshape(-1).view(np.uint8), rows // 64)
    return file_of({"w": Stored(values, data)})


def _step(node: ops.Tensor, file: Any = None, threads: int = 1, **inputs: np.ndarray) -> Work:
    """A step whose result is `node`; each of several threads keeps to a core of its own.

    (Systems may leave two on one core, and another idle, for as long as they wait but briefly.)
    """
    backend = CpuBackend(file, threads=threads)
    if threads > 1:
        backend.team.cores = shared_out(threads)
    program = backend.program(ops.Graph((node,)))
    live = {"tokens": int(node.shape[0])}
    return lambda: program.run(inputs, live)


@functools.cache
def _matmul(kind: str, tokens: int, rows: int, inner: int) -> Work:
    x = ops.step_input("x", (ops.Dim("tokens", tokens), inner), F32)
    w = ops.weight("w", (rows, inner), DTYPES[kind.lower()])
    values = np.random.default_rng(1).standard_normal((tokens, inner)).astype(np.float32)
    return _step(ops.matmul(x, w), _weights(kind, rows, inner), x=values)


@functools.cache
def _attention() -> Work:
    tokens, heads, kv_heads, dim = 128, 4, 2, 128
    t = ops.Dim("tokens", tokens)
    pages = (tokens // ops.PAGE, ops.PAGE, kv_heads, dim)
    k, v = (ops.state(name, pages, DTYPES["f16"]) for name in "kv")
    q = ops.step_input("q", (t, heads, dim), F32)
    block_table = ops.step_input("block_table", (1, pages[0]))
    sequences, places = (ops.step_input(name, (t,)) for name in ("sequences", "places"))
    return _step(
        ops.attention(q, k, v, block_table, sequences, places, scale=dim**-0.5),
        q=np.ones((tokens, heads, dim), np.float32), places=np.arange(tokens),
        block_table=np.arange(pages[0])[None], sequences=np.zeros(tokens, np.int32),
    )  # fmt: skip


@functools.cache
def _rows() -> Work:
    """Rows of the instruction table that do next to nothing."""
    node = ops.step_input("x", (ops.Dim("tokens", 1), 16), F32)
    for i in range(4000):
        node = ops.scale(node, factor=1.0 + i)
    return _step(node, x=np.ones((1, 16), np.float32))


@functools.cache
def _softmaxes(threads: int) -> Work:
    """Instructions that one thread works at for some 15 µs."""
    node = ops.step_input("x", (ops.Dim("tokens", 1), 1 << 14), F32)
    for _ in range(15):
        node = ops.softmax(node)
    values = np.random.default_rng(2).standard_normal((1, 1 << 14)).astype(np.float32)
    return _step(node, threads=threads, x=values)


KINDS = ("F16", "Q8_0", "Q4_0")
PROMPT = 64, 512, 1024
DECODE = 1, 8192, 1024  # beyond the caches of a core


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """All kernels are compiled before the first test is alone on the machine."""
    _attention(), _rows(), _softmaxes(2)
    for kind in KINDS:
        _matmul(kind, *PROMPT)
        _matmul(kind, *DECODE)
    library().prepare(Kernel.of(name) for name in ("lead_teams", "meet", "all_sum"))


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_matmul(benchmark: Any, kind: str):
    hold(benchmark, f"prompt matmul {kind}", _matmul(kind, *PROMPT), computing(100_000))


@pytest.mark.parametrize("kind", KINDS)
def test_decode_matmul_against_reading_memory(benchmark: Any, kind: str):
    nbytes = _weights(kind, *DECODE[1:]).tensors["w"].nbytes
    hold(benchmark, f"decode matmul {kind}", _matmul(kind, *DECODE), reading(nbytes))


def test_attention(benchmark: Any):
    hold(benchmark, "attention", _attention(), computing(100_000))


def test_cost_of_an_op(benchmark: Any):
    hold(benchmark, "rows", _rows(), computing(30_000))


def test_waiting_for_another_thread():
    """Instructions that one of two threads works at take no longer than alone.

    The best of many short steps: on a busy machine, too, some have both processors throughout.
    """
    works = [_softmaxes(1), _softmaxes(2)]
    best = [math.inf, math.inf]
    for turn in range(400):
        best = [min(known, _best(work, 10)) for known, work in zip(best, works, strict=True)]
        if turn >= 10 and best[0] >= KEEP * best[1]:
            return
    pytest.fail(f"one thread takes {best[0] * 1e6:.0f} µs, two {best[1] * 1e6:.0f} µs")


def test_a_sum_over_two_devices(monkeypatch: pytest.MonkeyPatch):
    """4 KiB of each, from when both have written it to when both have the sum: 3 µs at most."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "scripts")
    from bench_all_sum import microseconds

    seen = []
    while not seen or (seen[-1] > 3 and len(seen) < ATTEMPTS):
        alone = microseconds([1, 1], 1024, False, False)
        seen.append(microseconds([1, 1], 1024, False, True) - alone)
    assert seen[-1] <= 3, f"microseconds: {np.round(seen, 2)}"


def test_warm_start_loads_and_never_compiles():
    """The kernels of this file are on disk by now: finding them is cheap."""
    start = time.perf_counter()
    library().missing([Kernel.of("executor")])
    assert time.perf_counter() - start < 0.05


@pytest.mark.parametrize("slower, fails", [(1.0, False), (1.25, True)])
def test_a_slower_kernel_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slower: float, fails: bool
):
    """The measure itself, on the partner's loop beside one a fifth slower."""
    known = {isa.selected(): {"processor": _processor(), "self": 1.0}}
    monkeypatch.setattr(sys.modules[__name__], "BASELINE", tmp_path / "baseline.json")
    BASELINE.write_text(json.dumps(known), encoding="utf-8")
    monkeypatch.delenv("UPDATE_BASELINE", raising=False)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    expected = (
        pytest.raises(pytest.fail.Exception, match="self: ratios") if fails else nullcontext()
    )
    with expected:
        _held("self", computing(int(100_000 * slower)), computing(100_000))
