"""The cache of prompts: what is begun from it has the bits of what is evaluated anew."""

from __future__ import annotations

import gc
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from random_edits import Edits
from small_models import NOVEL, Sizes, write_model

import runtime
from runtime.ops.kv_formats import KV_FORMATS

SIZES = {"dense": Sizes(layers=1), "hybrid": replace(NOVEL["qwen35"], layers=2)}
STEPS = int(os.environ.get("EDIT_STEPS", 0))
LONG = [(name, kind) for kind in KV_FORMATS for name in SIZES]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("prompts")
    return {name: write_model(folder / f"{name}.gguf", size) for name, size in SIZES.items()}


def edited(path: Path, seed: int, steps: int, sequences: int = 2, **options) -> Edits:
    options = {"context": 256, "threads": 1, **options}
    with (
        runtime.load(path, sequences=sequences, **options) as model,
        runtime.load(path, prompt_cache=False, sequences=1, **options) as cold,
    ):
        edits = Edits(model, cold, seed)
        edits.run(steps)
    return edits


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dense", {}), ("hybrid", {}), ("dense", {"kv_type": "q8_0,q4_0"}),
        ("hybrid", {"devices": "tensor(cpu:0,cpu:1)", "threads": 2}), ("hybrid", {"sequences": 1}),
    ],
    ids=str,
)  # fmt: skip
def test_random_edits(files: dict[str, Path], name: str, options: dict):
    edits = edited(files[name], 5, 300, **options)
    assert edits.cached > 1000


@pytest.mark.sweep
@pytest.mark.timeout(0)
@pytest.mark.parametrize(("name", "kind"), LONG, ids="-".join)
@pytest.mark.parametrize("devices", ["cpu", "tensor(cpu:0,cpu:1)"])
def test_many_random_edits(files: dict[str, Path], name: str, kind: str, devices: str):
    """EDIT_STEPS of them, over all kinds together."""
    steps = (STEPS or 10_000) // (2 * len(LONG))
    for seed, sequences in enumerate((1, 2, 4)):
        edited(files[name], seed, -(-steps // 3), sequences, kv_type=kind, devices=devices)


def nbytes(x: object, seen: set[int]) -> int:
    """Of an object and all it refers to, but types and what is seen already."""
    if id(x) in seen or isinstance(x, type):
        return 0
    seen.add(id(x))
    refers = [x.base] if isinstance(x, np.ndarray) and x.base is not None else gc.get_referents(x)
    return sys.getsizeof(x) + sum(nbytes(each, seen) for each in refers)


@pytest.mark.parametrize("name", SIZES)
def test_a_budget_is_never_exceeded(files: dict[str, Path], name: str):
    """With all that is held and what it takes to find it, by prompts that have starts alike."""
    budget, rng = (600_000 if name == "dense" else 1_200_000), random.Random(3)
    with runtime.load(files[name], context=256, cache_bytes=budget) as model:
        engine, memory = model._engine, model.memory()
        pool = memory.pages * memory.page + memory.slots * memory.state
        seen = {id(engine.pools)}
        assert budget * 0.7 < pool < budget
        starts = [rng.choices(range(80), k=rng.randint(1, 90)) for _ in range(20)]
        most = used = 0
        for n in range(400):
            tokens = [*rng.choice(starts), *rng.choices(range(80), k=rng.randint(1, 60))]
            with model.session() as session:
                with engine.alone():
                    used += engine.prompts.resume(session._sequence, 0, tokens).cached_tokens
                session.eval(tokens[len(session) :], "last")
            if n % 10 == 0:
                most = max(most, nbytes(engine.prompts, set(seen)))
        assert used > 1000 and engine.pools.pages.free < memory.pages // 2
        assert pool + most <= budget


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"cache_bytes": 1 << 60}, "cache_bytes=1073741824.00 GiB: .* is free beside the"),
        ({"cache_bytes": 100}, "cache_bytes=100 bytes holds at most context=0, and .* is the"),
        ({"cache_bytes": 90_000, "context": 256}, "holds at most context=.*context=256; give"),
        ({"cache_bytes": "1G"}, "cache_bytes='1G' must be a whole number, or None"),
        ({"prompt_cache": 1}, "prompt_cache=1 must be True or False"),
    ],
)  # fmt: skip
def test_what_no_budget_can_be(files: dict[str, Path], given: dict, says: str):
    with pytest.raises(runtime.Error, match=says):
        runtime.load(files["hybrid"], **given)
