"""Head sizes on a GPU: attention's up to 256, and those of delta layers, in tiny random models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_models import on_fake_cuda
from small_models import NOVEL, Sizes, write_model

import runtime
from runtime.errors import BackendError

IDS = list(range(2, 9))


def error(sizes: Sizes, folder: Path, **options: Any) -> float:
    """Normalised squared error of a prompt's and single tokens' logits; the same bits in turns."""
    path = write_model(folder / "m.gguf", sizes, "F32")
    with runtime.load(path, devices="reference", progress=False) as model:
        want = model.eval(IDS)
    with on_fake_cuda(path, activations="f32", **options) as model:
        with model.session() as session:
            whole = session.eval(IDS)
        with model.session() as session:
            cut = [session.eval(IDS[:3]), *(session.eval([token]) for token in IDS[3:])]
            np.testing.assert_array_equal(np.concatenate(cut), whole)
    return float(((whole - want) ** 2).sum() / (want**2).sum())


@pytest.mark.parametrize("dim", [8, 20, 80, 96, 112, 192, 256])
def test_heads_of_attention(dim: int, tmp_path: Path):
    sizes = Sizes("llama", layers=1, heads=3, kv_heads=1, dim=dim)
    assert error(sizes, tmp_path, kv_type="f32") < 1e-7
    if dim % 8 == 0:
        assert error(sizes, tmp_path, kv_type="q8_0") < 1e-4


@pytest.mark.parametrize("k_dim, v_dim", [(64, 64), (128, 128), (48, 256)])
def test_heads_of_delta_layers(k_dim: int, v_dim: int, tmp_path: Path):
    sizes = replace(NOVEL["qwen35"], layers=2, key_heads=1, value_heads=2, k_dim=k_dim, v_dim=v_dim)
    assert error(sizes, tmp_path, kv_type="f32") < 1e-7


@pytest.mark.parametrize(
    "sizes, says",
    [
        (Sizes("llama", layers=1, heads=2, kv_heads=1, dim=264), "heads of 264"),
        (replace(NOVEL["qwen35"], layers=2, k_dim=256), "heads of 256 are more than 128"),
    ],
)
def test_what_is_refused_is_one_line(sizes: Sizes, says: str, tmp_path: Path):
    path = write_model(tmp_path / "m.gguf", sizes, "F32")
    with pytest.raises(BackendError, match=says) as found, on_fake_cuda(path, kv_type="f32"):
        pass
    assert "\n" not in str(found.value)
