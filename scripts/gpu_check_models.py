"""Golden models on the GPU: right, the same replayed and launched, the same on virtual devices."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from gpu_check_setup import Check, Row

from runtime.model import Model
from runtime.ops.errors import BackendError
from runtime.session import Session

_PROMPTS = "p48", "p130"
_ROUNDED = 2e-5  # of float weights: the cache is f16
_UNKNOWN = 2e-2  # where no peer's error is known
_SUMMED = 1e-3  # of the middle row, where sums are cut and roundings to int8 flip
_STEPS = 1000
_REPLAYED = ("qwen3", "Q4_K_M"), ("qwen35moe", "Q4_K_M"), ("gptoss", "f16"), ("qwen3next", "Q8_0")
_SPLIT = ("qwen3", "f16"), ("qwen35moe", "Q8_0"), ("gptoss", "f16")
_DEVICES = ("layers(cuda:{0},cuda:{0})", "tensor(cuda:{0},cuda:{0})",
            "tensor(2*cuda:{0},cuda:{0},cuda:{0})")  # fmt: skip


def golden(check: Check) -> Iterator[Row]:
    """NMSE of every file and prompt, the limit that the CPU has, and what cutting it changes."""
    if check.dry:
        yield _against_reference(check, *_small(check))
        return
    assert check.golden is not None, "the golden models are carried: see --prepare"
    for path in sorted(check.golden.glob("*/model-*.gguf")):
        name = f"{path.parent.name} {path.stem.removeprefix('model-')}"
        arrays = dict(np.load(path.parent / "golden.npz"))
        try:
            with check.model(path) as model:
                for prompt in _PROMPTS:
                    error, limit = _error(arrays, path, model, prompt)
                    differing = _cut(model, arrays[f"{prompt}_ids"].tolist())
                    yield {
                        "name": f"{name} {prompt}",
                        "nmse": error,
                        "limit": limit,
                        "differing": differing,
                        "right": error <= limit and not differing,
                    }
        except BackendError as failure:
            yield {"name": name, "says": str(failure), "right": False}


def _cut(model: Model, ids: list[int]) -> int:
    """Rows with other bits where the prompt comes in pieces, of one token and of some."""
    whole, cuts = model.eval(ids), [*range(min(3, len(ids))), *range(3, len(ids), 40), len(ids)]
    with model.session() as session:
        pieces = [session.eval(ids[a:b]) for a, b in pairwise(cuts)]
    return int((np.concatenate(pieces) != whole).any(1).sum())


def _error(arrays: dict[str, np.ndarray], path: Path, model: object, prompt: str) -> tuple:
    """(error, limit): NMSE, or for quantised weights the median of the rows' errors."""
    kind = path.stem.removeprefix("model-").lower()
    got = model.eval(arrays[f"{prompt}_ids"].tolist())  # type: ignore[attr-defined]
    if kind in ("f32", "f16"):
        want = arrays[f"{prompt}_logits"]
        peer = arrays.get(f"lc_f32_{prompt}_logits")  # gpt-oss: MXFP4 in every file
        limit = _ROUNDED if peer is None else 1.2 * nmse(peer[-len(want) :], want)
        return nmse(got[-len(want) :], want), limit
    want, peer = arrays[f"deq_{kind}_{prompt}_logits"], arrays.get(f"lc_{kind}_{prompt}_logits")
    limit = _UNKNOWN if peer is None else 1.2 * _median(peer[-len(want) :], want)
    return _median(got[-len(want) :], want), limit


def nmse(got: np.ndarray, want: np.ndarray) -> float:
    """Of all rows together."""
    got, want = got.astype(np.float64), want.astype(np.float64)
    return float(((got - want) ** 2).sum() / max(float((want**2).sum()), 1e-300))


def _median(got: np.ndarray, want: np.ndarray) -> float:
    got, want = got.astype(np.float64), want.astype(np.float64)
    return float(np.median(((got - want) ** 2).sum(1) / (want**2).sum(1)))


def _small(check: Check) -> tuple[Path, list[int]]:
    """A random model and a prompt that even the simulated GPU runs quickly."""
    from small_models import write_model

    return write_model(check.scratch / "small.gguf"), [1, 2, 3]


def _against_reference(check: Check, path: Path, ids: list[int]) -> Row:
    import runtime

    with runtime.load(path, devices="reference", context=64, sequences=1) as model:
        want = model.eval(ids)
    with check.model(path, context=64, activations="f32") as model:
        error, differing = nmse(model.eval(ids), want), _cut(model, ids)
    right = error <= _ROUNDED and not differing
    return {"name": "small f32", "nmse": error, "limit": _ROUNDED, "differing": differing,
            "right": right}  # fmt: skip


def replays(check: Check) -> Iterator[Row]:
    """Greedy decoding by replayed graphs and launch by launch: every row of logits to the bit."""
    for path, ids, steps in _decoded(check, _REPLAYED, _STEPS):
        runs = []
        for graphs in (True, False):
            with check.model(path, graphs=graphs, context=len(ids) + steps) as model:
                start = time.monotonic()
                with model.session() as session:
                    runs.append(_digests(session, ids, steps))
                took = math.nan if check.dry else 1e6 * (time.monotonic() - start) / steps
                runs[-1] = runs[-1], took
        (replayed, quick), (eager, slow) = runs
        differing = sum(a != b for a, b in zip(replayed, eager, strict=True))
        name = f"{path.parent.name} {path.stem}"
        yield {"name": name, "steps": steps, "differing": differing, "replayed_us": quick,
               "eager_us": slow, "right": not differing}  # fmt: skip


def _decoded(check: Check, names: tuple, steps: int) -> Iterator[tuple[Path, list[int], int]]:
    if check.dry:
        yield (*_small(check), 2)
        return
    assert check.golden is not None, "the golden models are carried: see --prepare"
    for name, kind in names:
        arrays = np.load(check.golden / name / "golden.npz")
        yield check.golden / name / f"model-{kind}.gguf", arrays["p48_ids"].tolist(), steps


def _digests(session: Session, ids: list[int], steps: int) -> list[bytes]:
    """Of each step's logits, after the prompt's."""
    import hashlib

    found, row = [], session.eval(ids)[-1]
    for _ in range(steps):
        found.append(hashlib.sha256(row.tobytes()).digest())
        row = session.eval([int(row.argmax())])[-1]
    return found


def splits(check: Check) -> Iterator[Row]:
    """Logits of a prompt on virtual devices of the one card, against those of one device."""
    for path, ids, _ in _decoded(check, _SPLIT, 0):
        with check.model(path) as model:
            want = model.eval(ids)
        name = f"{path.parent.name} {path.stem}"
        for expression in _DEVICES[: 1 if check.dry else None]:
            devices = expression.format(check.index)
            try:
                with check.model(path, devices) as model:
                    got = model.eval(ids)
            except BackendError as failure:
                yield {"name": f"{name} {devices}", "says": str(failure), "right": False}
                continue
            error, equal = nmse(got, want), bool(np.array_equal(got, want))
            close = equal if devices.startswith("layers") else _median(got, want) <= _SUMMED
            right = close and bool(want.any())
            yield {"name": f"{name} {devices}", "nmse": error, "equal": equal, "right": right}
