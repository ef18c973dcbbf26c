"""Full-size random models on the GPU: decode and prompt against what the GPU gives at best."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from gpu_check_setup import ROOT, Check, Row

from runtime import traffic
from runtime.backends.base import Choice
from runtime.backends.cuda.peaks import peaks
from runtime.cli.bench_timeline import step
from runtime.report.timeline_svg import picture
from runtime.session import Session

_DECODED, _WINDOW = 160, 8  # tokens, and those that one time is taken of
_EAGER = 24
_PROMPT = 2048


class Model(NamedTuple):
    """A preset of make_random_model.py, its type, and how many of its layers are enough."""

    preset: str
    type: str
    layers: int


MODELS = (
    Model("llama-8b", "Q4_K_M", 32),
    Model("llama-8b", "Q8_0", 32),
    Model("qwen35moe-35b", "Q4_K_M", 40),
    Model("qwen3next-80b", "Q4_K_M", 24),
)
_DRY = Model("qwen3-0.6b", "Q4_0", 1)


def speed(check: Check) -> Iterator[Row]:
    """A row for each model."""
    for model in (_DRY,) if check.dry else MODELS:
        path = check.scratch / f"{model.preset}-{model.type}.gguf"
        begun = time.monotonic()
        make(model, path, check.dry)
        row = {"name": f"{model.preset} {model.type}, {model.layers} layers"}
        row |= {"gb": path.stat().st_size / 1e9, "made_s": time.monotonic() - begun}
        try:
            row |= _measured(check, path)
        except Exception as failure:  # the other models are still worth their time
            row |= {"says": f"{type(failure).__name__}: {failure}", "right": False}
        path.unlink()
        yield _without_times(row) if check.dry else row


def make(model: Model, path: Path, dry: bool = False) -> None:
    """Write the file."""
    command = [sys.executable, str(ROOT / "scripts" / "make_random_model.py"), model.preset]
    command += [model.type, str(path), "--layers", str(model.layers)]
    subprocess.run(command + ["--vocab-size", "256"] * dry, check=True, capture_output=True)


def _measured(check: Check, path: Path) -> Row:
    start = time.monotonic()
    options: dict[str, Any] = {"execute": False, "context": 128 if check.dry else 4096}
    with check.model(path, **options) as model:
        row: Row = {"load_s": time.monotonic() - start}
        best = peaks(model.backend.device)  # type: ignore[attr-defined]
        free, total = model.backend.device.memory_info()  # type: ignore[attr-defined]
        moved = traffic.of_file(model.file, model.kv_types, 64)
        with model.session() as session:
            row |= _decoding(check, session, moved.nbytes, best.copy)
        row |= _timeline(model, path)
        with model.session() as session:
            row |= _prompt(check, session, moved.macs, best)
        row |= {"used_gb": (total - free) / 1e9}
        with model.session() as session:
            each = _eager(check, session)
        row |= {"eager_ms": 1e3 * each, "replay_over_eager": each / (row["ms"] / 1e3)}
    return row


def _timeline(model: Any, path: Path) -> Row:
    """A decode step's launches: what lies between them as they are replayed, and a picture."""
    found = step(model)
    title = f"{path.name} on {model.backend.name}"
    return {
        "busy_us": 1e6 * found.busy, "replayed_us": 1e6 * found.replayed,
        "gap_us": 1e6 * found.gap, "svg": picture(found, title),
    }  # fmt: skip


def _eager(check: Check, session: Session) -> float:
    """Seconds of a token whose launches are given one by one."""
    session.eval([1, 2, 3])
    program = session.model._engine.programs.of(1, 1)
    program._replayed = False  # type: ignore[attr-defined]
    each = median(_times(session, 2 if check.dry else _EAGER, 1))
    program._replayed = True  # type: ignore[attr-defined]
    return each


def _decoding(check: Check, session: Session, nbytes: float, copy: float) -> Row:
    """Milliseconds of a token, the median of windows; the share of the copy's bandwidth."""
    session.eval([1, 2, 3])
    _times(session, 1 if check.dry else 2 * _WINDOW, 1)  # graphs are built, clocks rise
    backend = session.model.backend
    with backend.idle() as gaps:  # type: ignore[attr-defined]
        each = median(_times(session, 4 if check.dry else _DECODED, 2 if check.dry else _WINDOW))
    program = session.model._engine.programs.of(1, 1)
    launched = len(list(program.plan.calls()))
    return {
        "ms": 1e3 * each, "tokens_per_s": 1 / each, "bandwidth_share": nbytes / each / copy,
        "idle_us": 1e6 * median(gaps) if gaps else math.nan, "launches": launched,
    }  # fmt: skip


def _times(session: Session, tokens: int, window: int) -> list[float]:
    """Seconds of a token, of each window; the device chooses where it can."""
    engine, found = session.model._engine, []
    greedy, token = Choice(session.model.vocab_size), 1
    for _ in range(max(1, tokens // window)):
        start = time.perf_counter()
        for _ in range(window):
            chosen = None
            if engine.decoder is not None:
                chosen = engine.decoder.choose(session._sequence, token, greedy, greedy)
            if chosen is None:
                chosen = int(session.eval([token])[-1].argmax())
            token = chosen
        found.append((time.perf_counter() - start) / window)
    if engine.decoder is not None:
        engine.decoder.end()
    return found


def _prompt(check: Check, session: Session, macs: float, best: Any) -> Row:
    """Tokens per second of a long prompt; operations against both peaks of the tensor cores."""
    length = 8 if check.dry else _PROMPT
    ids = np.random.default_rng(1).integers(0, session.model.vocab_size, length).tolist()
    taken = []
    for _ in range(1 if check.dry else 3):
        with session.model.session() as fresh:
            start = time.perf_counter()
            fresh.eval(ids, logits="last")
            taken.append(time.perf_counter() - start)
    rate = 2 * macs * length / min(taken)
    return {
        "prompt_tokens_per_s": length / min(taken), "prompt_tops": rate / 1e12,
        "int8_share": rate / best.int8, "f16_share": rate / best.f16,
    }  # fmt: skip


def _without_times(row: Row) -> Row:
    kept = "name", "gb", "launches", "says", "right"
    return {key: value if key in kept else math.nan for key, value in row.items()}
