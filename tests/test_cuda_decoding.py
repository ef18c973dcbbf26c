"""GPUs that choose tokens ahead, alone and together: those that the host would have chosen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cuda_models import on_fake_gpus
from small_models import Sizes, write_model

from runtime.backends.base import Choice
from runtime.engine.advance import Piece
from runtime.engine.decoder import Next
from runtime.engine.engine import checked
from runtime.model import Model

SIZE = {"hidden": 32, "inner": 64, "vocabulary": 32}
MODELS = {
    "short": Sizes("qwen3", layers=1, **SIZE),
    "dense": Sizes("qwen3", **SIZE),
    "experts": Sizes("qwen3moe", experts=4, **SIZE),
    "hybrid": Sizes("qwen35", hidden=32, inner=64, vocabulary=32),
}
PROMPTS = [3, 9], [5]
STEPS = 3
GREEDY = Choice(SIZE["vocabulary"])


def path_of(folder: Path, name: str) -> Path:
    path = folder / f"{name}.gguf"
    return path if path.exists() else write_model(path, MODELS[name])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("decoding")


def by_host(model: Model, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Of each prompt the likeliest tokens behind it, in steps of all together."""
    sessions = [model.session() for _ in prompts]
    rows = [s.eval(p, "last")[0] for s, p in zip(sessions, prompts, strict=True)]
    found = [[int(row.argmax())] for row in rows]
    for _ in range(STEPS):
        pieces = [Piece(s._sequence, [each[-1]]) for s, each in zip(sessions, found, strict=True)]
        for each, result in zip(found, model._engine.run(pieces), strict=True):
            each.append(int(checked(result)[0].argmax()))
    for session in sessions:
        session.close()
    return found


def by_device(model: Model, prompts: Sequence[list[int]]) -> list[list[int]]:
    """The same, chosen by the device; each step but the last says that another follows."""
    decoder = model._engine.decoder
    assert decoder is not None
    decoder._pause = 0  # as if nobody had used the model meanwhile
    sessions = [model.session() for _ in prompts]
    rows = [s.eval(p, "last")[0] for s, p in zip(sessions, prompts, strict=True)]
    found = [[int(row.argmax())] for row in rows]
    for n in range(STEPS):
        then = GREEDY if n + 1 < STEPS else None
        wanted = [
            Next(s._sequence, each[-1], GREEDY, then)
            for s, each in zip(sessions, found, strict=True)
        ]
        chosen = decoder.choose_all(wanted)
        assert chosen is not None
        assert (decoder._ahead is not None) == (then is not None and model.backend.ahead)
        for each, token in zip(found, chosen, strict=True):
            each.append(checked(token))
    tokens = [session.tokens for session in sessions]
    wanted_tokens = [[*p, *each[:-1]] for p, each in zip(prompts, found, strict=True)]
    assert tokens == wanted_tokens
    decoder.choose(sessions[0]._sequence, found[0][-1], GREEDY, GREEDY)
    again = model.eval(prompts[0], "last")  # while the step ahead may still run
    assert again[0].argmax() == found[0][0]
    return found


ALL_CUDA = [
    ("hybrid", "cuda:0", 1, {}),
    ("short", "tensor(cuda:0,cuda:0)", 1, {}),
    ("short", "tensor(cuda:1,cuda:0)", 2, {"graphs": False}),
    ("dense", "layers(cuda:0,cuda:0)", 1, {}),
    ("dense", "layers(tensor(cuda:1,cuda:0),cuda:0)", 2, {}),
]
WITH_CPU = [
    ("dense", "cuda:0", 1, {"gpu_layers": 2}),
    ("experts", "layers(cuda:0,cuda:0)", 1, {"cpu_moe": True}),
]


@pytest.mark.parametrize(("name", "devices", "gpus", "options"), [*ALL_CUDA, *WITH_CPU])
def test_devices_choose_what_the_host_would(
    folder: Path, name: str, devices: str, gpus: int, options: dict[str, Any]
):
    """One sequence, then several together."""
    with on_fake_gpus(path_of(folder, name), devices, gpus, sequences=2, **options) as model:
        assert model.backend.ahead == ("cpu" not in model.backend.name)
        wanted = by_host(model, PROMPTS)
        assert by_device(model, PROMPTS) == wanted
        assert by_device(model, PROMPTS[:1]) == wanted[:1]


@pytest.mark.parametrize("devices", ["cpu", "layers(cuda:0,cpu)", "tensor(cpu:0,cpu:1)"])
def test_the_host_chooses_behind_a_cpu(folder: Path, devices: str):
    with on_fake_gpus(path_of(folder, "dense"), devices) as model:
        assert model._engine.decoder is None
