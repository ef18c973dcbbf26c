"""VALIDATE on GPUs: each launch against what its ops mean, read out of the GPU's memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_models import on_fake_cuda
from small_models import NOVEL, Sizes, write_model

from runtime.backends.cuda import contents, stores
from runtime.backends.cuda.contents import Packed
from runtime.backends.cuda.layouts import quantize
from runtime.errors import BackendError

SIZES = {"llama": Sizes("llama"), "qwen3moe": Sizes("qwen3moe", experts=6, inner=32), **NOVEL}
KINDS = (
    ("llama", "Q4_0", "int8", "q8_0"),
    ("qwen3moe", "Q8_0", "f32", "bf16"),
    ("qwen35moe", "Q4_0", "int8", "f16"),
    ("qwen3next", "F32", "int8", "f32,q4_0"),
    ("gpt-oss", "Q8_0", "int8", "f16"),
)


@pytest.fixture(autouse=True)
def _validate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VALIDATE", "1")


def steps(path: Path, **options: Any) -> None:
    """A prompt that more than one tile of experts takes, one token, and a batch."""
    with on_fake_cuda(path, sequences=2, **options) as model, model.session() as session:
        session.eval(list(range(2, 22)), "last")
        child = session.fork()
        session.eval([3])
        model.step([(session, [5]), (child, [6, 7])])


@pytest.mark.parametrize("name, kind, activations, kv_type", KINDS)
def test_every_launch_is_what_its_ops_mean(
    tmp_path: Path, name: str, kind: str, activations: str, kv_type: str, capsys
):
    path = write_model(tmp_path / "m.gguf", SIZES[name], kind)
    steps(path, activations=activations, kv_type=kv_type)
    said = capsys.readouterr().err
    assert re.search(r"results of 3 steps agree with the reference", said), said


def _scaled(raw: np.ndarray, w: Any) -> np.ndarray:
    return _widened(raw, w) * np.float32(1.001)


_widened = stores.widened


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_the_first_difference_is_named(
    tmp_path: Path, kv_type: str, monkeypatch: pytest.MonkeyPatch, capsys
):
    path = write_model(tmp_path / "m.gguf", SIZES["llama"], "Q8_0")
    monkeypatch.setattr(stores, "widened", _scaled)
    message = (
        r"VALIDATE: rms_norm_pack \(instruction 1, rms_norm.*\) differs from the reference in block"
    )
    with pytest.raises(BackendError, match=message):
        steps(path, kv_type=kv_type)
    monkeypatch.undo()
    monkeypatch.setenv("VALIDATE", "1")
    assert "agree" not in capsys.readouterr().err


def test_what_nothing_was_to_write_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_model(tmp_path / "m.gguf", SIZES["llama"], "Q8_0")
    state, seen = contents.Contents.pages, []

    def pages(self: Any, leaf: Any) -> np.ndarray:
        seen.append(leaf)
        found = state(self, leaf)
        found[-1] += np.uint8(len(seen) > 1)  # of a page that no sequence has
        return found

    monkeypatch.setattr(contents.Contents, "pages", pages)
    read = contents.Contents.read
    monkeypatch.setattr(
        contents.Contents, "read", lambda self, leaf, rows: read(self, leaf, rows) + np.float32(1)
    )
    with pytest.raises(BackendError, match=r"which nothing was to write"):
        steps(path, kv_type="f32")


@pytest.mark.parametrize("n", [32, 96, 1056])
def test_packed_rows_are_taken_apart(n: int, rng):
    x = rng.standard_normal((3, n)).astype(np.float32)
    raw = quantize(x)
    packed = Packed.of(raw, n, "int8")
    assert not packed.wrong(x.astype(np.float64), 0.0).any()
    for at in (0, raw.shape[1] - 1, raw.shape[1] - 4):  # a code, a sum, a scale
        spoilt = raw.copy()
        spoilt[1, at] ^= 0x40
        found = np.argwhere(Packed.of(spoilt, n, "int8").wrong(x.astype(np.float64), 0.0))
        assert len(found) <= 1 and all(row == 1 for row, _ in found)
    spoilt = raw.copy()
    spoilt[2, 0] += 1
    assert Packed.of(spoilt, n, "int8").wrong(x.astype(np.float64), 0.0)[2, 0]
