"""Golden models: logits against transformers (float) and llama.cpp (quantised)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import runtime

DENSE = ["llama", "qwen2", "qwen3", "qwen3moe"]


def _arrays(golden: Path, name: str) -> dict[str, np.ndarray]:
    return dict(np.load(golden / name / "golden.npz"))


def _nmse(got: np.ndarray, want: np.ndarray) -> float:
    got, want = got.astype(np.float64), want.astype(np.float64)
    return float(((got - want) ** 2).sum() / (want**2).sum())


def _median_row(got: np.ndarray, want: np.ndarray) -> float:
    got, want = got.astype(np.float64), want.astype(np.float64)
    return float(np.median(((got - want) ** 2).sum(1) / (want**2).sum(1)))


@pytest.mark.parametrize("kind", ["f32", "f16"])
@pytest.mark.parametrize("name", DENSE)
def test_float_files(golden: Path, name: str, kind: str):
    arrays = _arrays(golden, name)
    path = golden / name / f"model-{kind}.gguf"
    with runtime.load(path, kv_type="f32", context=1024) as model:
        for prompt in ("p48", "p130"):
            ids = arrays[f"{prompt}_ids"].tolist()
            with model.session() as session:
                logits = session.eval(ids)
                assert _nmse(logits, arrays[f"{prompt}_logits"]) <= 1e-10
                greedy, row = [], logits[-1]
                for _ in arrays[f"{prompt}_greedy"]:
                    greedy.append(int(row.argmax()))
                    row = session.eval(greedy[-1:])[-1]
            assert greedy == arrays[f"{prompt}_greedy"].tolist()


@pytest.mark.parametrize("kind", ["q4_0", "q8_0", "q4_k_m"])
def test_quantised_files(golden: Path, kind: str):
    arrays = _arrays(golden, "qwen3")
    path = golden / "qwen3" / f"model-{kind.upper()}.gguf"
    for activations in ("int8", "f32"):
        with runtime.load(path, kv_type="f32", context=1024, activations=activations) as model:
            for prompt in ("p48", "p130"):
                exact = arrays[f"deq_{kind}_{prompt}_logits"]
                got = model.eval(arrays[f"{prompt}_ids"].tolist())[-len(exact) :]
                peer = arrays[f"lc_{kind}_{prompt}_logits"][-len(exact) :]
                limit = 1.2 * _median_row(peer, exact) if activations == "int8" else 1e-10
                assert _median_row(got, exact) <= limit
