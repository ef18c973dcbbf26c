"""Golden models without a GPU: their launches on the fake driver, kernels in numpy, replayed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from cuda_models import on_fake_cuda
from row_errors import check_rows, worst_row

import runtime
from runtime.backends.base import Choice
from runtime.session import Session

# of each row; K and V are rounded to f16, on the CPU 4e-7 of qwen3
LIMITS = {("qwen3", "f32"): 1e-6, ("qwen35moe", "f32"): 2e-8}
MODELS = [*LIMITS, ("qwen3", "Q4_K_M"), ("qwen35moe", "Q4_K_M"), ("gptoss", "f32")]
PROMPT, SINGLE, STEPS = 6, 1, 2  # tokens in one step, tokens one by one, tokens that are chosen


def check_near(golden: Path, name: str, kind: str, ids: list[int], rows: np.ndarray) -> None:
    """Rows of the first tokens: near the exact ones, or for quantised files the CPU's."""
    arrays = np.load(golden / name / "golden.npz")
    if kind == "f32":
        exact = arrays["p48_logits"]
        peer = 1.2 * worst_row(arrays["lc_f32_p48_logits"], exact) if name == "gptoss" else None
        check_rows(rows, exact[: len(rows)], LIMITS.get((name, kind), peer))
        return
    with runtime.load(golden / name / f"model-{kind}.gguf", context=64, threads=1) as model:
        check_rows(rows, model.eval(ids), 1e-3, flips=1, flipped=0.2)


def decoded(session: Session, row: np.ndarray) -> np.ndarray:
    """The logits of some steps, each of the likeliest token so far; the first are `row`."""
    rows = [row]
    for _ in range(STEPS):
        rows.append(session.eval([int(rows[-1].argmax())])[0])
    return np.array(rows)


@pytest.mark.parametrize(("name", "kind"), MODELS)
def test_a_golden_model(golden: Path, name: str, kind: str):
    """A prompt and single tokens near the reference; then tokens of its own, replayed, launch by
    launch with the same bits, and chosen by the device."""
    ids = np.load(golden / name / "golden.npz")["p48_ids"][: PROMPT + SINGLE].tolist()
    path = golden / name / f"model-{kind}.gguf"
    with on_fake_cuda(path, context=64) as model, model.session() as session:
        rows = [*session.eval(ids[:PROMPT]), *(session.eval([i])[0] for i in ids[PROMPT:])]
        check_near(golden, name, kind, ids, np.array(rows))
        replayed, fork = decoded(session.fork(), rows[-1]), session.fork()
        for program in model.backend._programs.values():
            program._replayed = False
        np.testing.assert_array_equal(decoded(fork, rows[-1]), replayed)
        for program in model.backend._programs.values():
            program._replayed = True
        decoder, greedy = model._engine.decoder, Choice(model.vocab_size)
        for token, then in pairwise(replayed.argmax(1).tolist()):
            assert decoder.choose(session._sequence, token, greedy, greedy) == then


def test_a_hybrid_has_the_same_bits_in_any_pieces(golden: Path):
    """Steps of up to 8, of 16 and of 32 tokens have different kernels."""
    ids = np.load(golden / "qwen3next" / "golden.npz")["p48_ids"][:20].tolist()
    with on_fake_cuda(golden / "qwen3next" / "model-Q8_0.gguf", context=64) as model:
        whole = model.eval(ids)
        with model.session() as session:
            pieces = [session.eval(ids[a:b]) for a, b in pairwise((0, 1, 2, 8, 20))]
        np.testing.assert_array_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize(("name", "kind"), [("qwen3moe", "f16"), ("qwen3", "bf16")])
def test_tokens_times_halves_have_the_same_bits_anywhere(
    golden: Path, name: str, kind: str, tmp_path: Path
):
    """In a prompt that takes tiles, one by one, in other pieces, and beside another sequence.

    As near the exact logits as the CPU's must be.
    """
    source, path = golden / name / "model-f32.gguf", golden / name / f"model-{kind}.gguf"
    if not path.exists():
        path = tmp_path / path.name
        runtime.quantize(source, path, kind, progress=False)
    ids = np.load(golden / name / "golden.npz")["p48_ids"][:36].tolist()
    options = {"kv_type": "f32", "context": 64}
    with runtime.load(path, devices="reference", **options) as model:
        exact = model.eval(ids)
    with on_fake_cuda(path, sequences=2, **options) as model:
        whole = model.eval(ids)
        check_rows(whole, exact, 2e-10)
        programs = model.backend._programs.values()
        assert "tile_half" in {call.kernel.name for p in programs for call in p.plan.calls()}
        with model.session() as session, model.session() as other:
            pieces = [session.eval(ids[:1]), session.eval(ids[1:4])]
            for a, b in pairwise((4, 13, 35, 36)):
                found, _ = model.step([(session, ids[a:b]), (other, ids[:3])])
                pieces.append(found)
        np.testing.assert_array_equal(np.concatenate(pieces), whole)
