"""Files changed at random, loaded and evaluated: one clear line, or the right numbers.

10,000 of them with `-m sweep`, some by default. A worker process that crashes or hangs is told
apart from an error; no file may take more than 10 s of a processor, compiling aside, or much
memory.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from mutated_files import EXACT, IDS, MODELS, Outcome, draft, mutated, outcome, outcomes

import runtime
from runtime.model import Model

SECONDS, MEMORY = 10.0, 300 << 20


def check(found: list[Outcome], refused: float, evaluated: float) -> None:
    """Nothing but refusals and right numbers, and enough of both."""
    wrong = [o for o in found if o.kind == "raised" or (o.kind == "evaluated" and o.text)]
    wrong += [o for o in found if o.seconds > SECONDS or o.memory > MEMORY]
    shown = [f"{o.seed} ({mutated(o.seed)[1]}): {o}" for o in wrong[:5]]
    assert not wrong, f"{len(wrong)} of {len(found)}: " + "\n".join(shown)
    kinds = Counter(o.kind for o in found)
    assert kinds["refused"] >= refused * len(found)
    assert kinds["evaluated"] >= evaluated * len(found)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    """Logits of the files before they are changed; kernels are compiled here, for all workers."""
    found, path = [], tmp_path_factory.mktemp("good") / "m.gguf"
    for size in MODELS:
        path.write_bytes(draft(size).bytes())
        with runtime.load(path, context=64, **EXACT) as model:
            found.append(model.eval([i % model.vocab_size for i in IDS]))
    return found


@pytest.mark.timeout(600)
def test_three_hundred_mutated_files(good: list[np.ndarray]) -> None:
    check(list(outcomes(range(300))), 0.5, 0.1)


@pytest.mark.sweep
@pytest.mark.timeout(3600)
def test_ten_thousand_mutated_files() -> None:
    check(list(outcomes(range(10_000))), 0.5, 0.1)


def test_the_files_are_good_before_they_are_changed(good: list[np.ndarray]) -> None:
    assert all(np.isfinite(logits).all() for logits in good)


def test_a_fault_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the check stands on: wrong numbers and errors of other kinds are told from refusals."""
    path, plain = tmp_path / "m.gguf", Model.eval
    numbers = (s for s in range(0, 1000, 5) if "data" not in mutated(s)[1])
    seed = next(s for s in numbers if outcome(s, path).kind == "evaluated")
    check([outcome(seed, path)], 0, 0.5)

    def wrong(model: Model, ids: list[int]) -> np.ndarray:
        return plain(model, ids) * (1.01 if "cpu" in model.backend.name else 1)

    for fault, seen in ((wrong, "NMSE 1.0e-04"), (lambda *_: [][1], "IndexError")):
        monkeypatch.setattr(Model, "eval", fault)
        with pytest.raises(AssertionError, match=f"1 of 1.*(?s:.*){seen}"):
            check([outcome(seed, path)], 0, 0.5)
