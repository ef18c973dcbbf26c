"""Golden models without a GPU: their launches on the fake driver, kernels in numpy, replayed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from cuda_models import on_fake_cuda
from row_errors import check_rows, worst_row

from runtime.backends.base import Choice
from runtime.session import Session

MODELS = [("qwen3", "f32"), ("qwen3", "Q4_K_M")]
CACHE = 1e-6  # of each row: K and V rounded to f16
PROMPT, STEPS = "p48", 6


def limit(arrays: dict[str, np.ndarray], kind: str) -> float:
    """Of floats what rounding K and V costs; else as far as llama.cpp is, as on the CPU."""
    if kind == "f32":
        return CACHE
    exact = arrays[f"deq_{kind.lower()}_{PROMPT}_logits"]
    return 1.2 * worst_row(arrays[f"lc_{kind.lower()}_{PROMPT}_logits"][-len(exact) :], exact)


def decoded(session: Session, token: int) -> np.ndarray:
    """The logits of some steps, each of the likeliest token so far."""
    rows = []
    for _ in range(STEPS):
        rows.append(session.eval([token])[0])
        token = int(rows[-1].argmax())
    return np.array(rows)


@pytest.mark.parametrize(("name", "kind"), MODELS)
def test_a_golden_model(golden: Path, name: str, kind: str):
    """A prompt near the reference, then tokens one by one: replayed, launch by launch with the same
    bits, and chosen by the device."""
    arrays = dict(np.load(golden / name / "golden.npz"))
    ids = arrays[f"{PROMPT}_ids"].tolist()
    exact = arrays[f"{PROMPT}_logits" if kind == "f32" else f"deq_{kind.lower()}_{PROMPT}_logits"]
    path = golden / name / f"model-{kind}.gguf"
    with on_fake_cuda(path, context=96) as model, model.session() as session:
        rows = session.eval(ids)
        check_rows(rows[-len(exact) :], exact, limit(arrays, kind))
        first = int(rows[-1].argmax())
        replayed = decoded(session, first)
        chosen = [first, *replayed.argmax(1).tolist()]
        if kind == "f32":
            assert chosen == arrays[f"{PROMPT}_greedy"][: len(chosen)].tolist()
        session.rewind(STEPS)
        for program in model.backend._programs.values():
            program._replayed = False
        np.testing.assert_array_equal(decoded(session, first), replayed)
        session.rewind(STEPS - 1)
        decoder, greedy = model._engine.decoder, Choice(model.vocab_size)
        for token, then in pairwise(chosen[1:]):
            assert decoder.choose(session._sequence, token, greedy, greedy) == then
