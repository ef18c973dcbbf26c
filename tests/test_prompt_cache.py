"""The cache of prompts: what is begun from it has the bits of what is evaluated anew."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

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
