"""Models with caches of every type: VALIDATE, the laws of sessions, and devices that share a cache.

Each type is K or V of a pair, of heads with a whole group of dims and half of one.
"""

from __future__ import annotations

from pathlib import Path

import fault_checks
import numpy as np
import pytest
from fault_checks import (
    Check,
    any_order_of_threads,
    law_of_batches,
    law_of_cuts,
    law_of_forks,
    law_of_rewinds,
    law_of_stages,
    load,
    steps,
    validate,
)
from small_models import Sizes, write_model
from tensor_models import load_split

from runtime import validation
from runtime.model import Model
from runtime.ops.kv_formats import KV_FORMATS, kv_format

PAIRS = ("f32,f32", "bf16,f16", "q8_0,q8_0", "q6_0,q5_1", "q5_0,iq4_nl", "iq4_nl,q4_1", "q4_0,q4_0")
LAWS = (
    validate, any_order_of_threads, law_of_cuts, law_of_batches, law_of_forks, law_of_rewinds,
    law_of_stages,
)  # fmt: skip
SHARES = ((1, 1), (1, 0, 2), (1, 1, 1, 1))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    size = Sizes(heads=6, kv_heads=3, dim=48)
    return write_model(tmp_path_factory.mktemp("caches") / "caches.gguf", size, "Q8_0")


def test_every_type_is_here() -> None:
    assert {kind for pair in PAIRS for kind in pair.split(",")} == set(KV_FORMATS)


@pytest.mark.parametrize("kv", PAIRS)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_laws_of_sessions(law: Check, kv: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fault_checks.CACHES, path.stem, kv)
    law(path)


def error(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    pairs = [*zip(found, wanted, strict=True)]
    return float(sum(((a - b) ** 2).sum() for a, b in pairs) / sum((b**2).sum() for _, b in pairs))


@pytest.mark.parametrize("kv", PAIRS)
def test_tensors_split(kv: str, path: Path) -> None:
    """The logits of one device; what two devices keep, others and one alone have bit by bit."""
    exact = {"kv_type": kv, "activations": "f32", "context": 128, "sequences": 3}
    with load(path, **exact) as model:
        wanted = steps(model)
        left = handed_over(model, None)
    for shares in SHARES:
        with load_split(path, shares, **exact) as model:
            assert error(steps(model), wanted) <= 1e-6
            left = handed_over(model, left)
    with load(path, **exact) as model:
        handed_over(model, left)


def handed_over(model: Model, kept: list[np.ndarray] | None) -> list[np.ndarray]:
    """Two pages of every leaf, as `kept` if that is what is written into them first."""
    with model.session() as session:
        session.eval([7 if kept is None else 9] * 50)
        leaves = model._engine.graphs.graph(1, 1).leaves("state")
        for leaf, rows in zip(leaves, kept or (), strict=bool(kept)):
            model.backend.write_state(leaf, range(2), rows)
        found = [model.backend.read_state(leaf, range(2)) for leaf in leaves]
    assert all(rows.any() for rows in found)
    for rows, before in zip(found, kept or (), strict=bool(kept)):
        np.testing.assert_array_equal(rows, before)
    return found


# Seeds of values among which two ways to round a group are so nearly as good that another is taken.
@pytest.mark.parametrize("kv, seed", [("q8_0", 15), ("q5_1", 17), ("q5_0", 144), ("q4_0", 0)])
def test_validate_takes_either_way_to_round(kv: str, seed: int) -> None:
    rng, rounded = np.random.default_rng(seed), kv_format(kv).rounded
    want = rng.standard_normal((400, 32))
    got = rounded(want * (1 + 2e-6 * rng.standard_normal(want.shape)))
    assert not validation._beyond(got, want, kv, 2e-6).any()
    small = np.concatenate([100 * want, want[:, :16]], 1)  # large values beside are no excuse
    got = rounded(small)
    got[7, 32:] = rounded(0.8 * small)[7, 32:]
    assert validation._beyond(got, small, kv, 2e-6).any(-1).nonzero()[0].tolist() == [7]
