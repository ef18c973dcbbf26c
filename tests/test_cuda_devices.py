"""Models on several CUDA devices, virtual ones among them, and on GPUs beside the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from cuda_models import on_fake_gpus
from small_models import Sizes, write_model

from runtime.backends.cuda.backend import CudaBackend
from runtime.engine import batch

SIZE = {"hidden": 32, "inner": 64, "vocabulary": 32}
MODELS = {
    "dense": Sizes("qwen3", **SIZE),
    "three heads": Sizes("llama", layers=1, heads=6, kv_heads=3, **SIZE),
    "experts": Sizes("qwen3moe", experts=4, **SIZE),
}
PROMPT, NEXT = [3, 9, 14, 7, 1], 5
Made = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Logits of a prompt and a token behind it: of a model, its type and what `load` takes."""
    folder = tmp_path_factory.mktemp("gpus")

    @cache
    def found(
        name: str, devices: str, gpus: int = 1, kind: str = "F32", exact: bool = False,
        **options: Any,
    ) -> np.ndarray:  # fmt: skip
        path = folder / f"{name} {kind}.gguf"
        if not path.exists():
            write_model(path, MODELS[name], kind)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CudaBackend, "exact", exact)
            patch.setattr(batch, "_STAGED", 2)  # of layers, a prompt takes several steps
            with (
                on_fake_gpus(path, devices, gpus, **options) as model,
                model.session() as session,
            ):
                return np.concatenate([session.eval(PROMPT), session.eval([NEXT])])

    return found


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(((found - wanted) ** 2).sum() / (wanted**2).sum())


@pytest.mark.parametrize(
    ("name", "devices", "gpus"),
    [
        ("dense", "tensor(cuda:0,cuda:0)", 1),
        ("dense", "tensor(3*cuda:0,cuda:1)", 2),
        ("three heads", "tensor(cuda:0,cuda:0,cuda:0)", 1),
        ("three heads", "tensor(cuda:0,2*cuda:1,cuda:0)", 2),
        ("dense", "layers(cuda:1,tensor(cuda:0,cuda:0))", 2),
    ],
)
def test_sums_of_parts(rows: Made, name: str, devices: str, gpus: int):
    assert error(rows(name, devices, gpus), rows(name, "cuda:0")) <= 1e-10


@pytest.mark.parametrize(
    ("name", "devices", "gpus", "kind"),
    [
        ("dense", "tensor(cuda:0,cuda:0)", 1, "Q8_0"),
        ("dense", "tensor(3*cuda:0,cuda:1)", 2, "F32"),
        ("three heads", "tensor(cuda:0,cuda:0,cuda:0)", 1, "F32"),
    ],
)
def test_bits_of_one_device_where_no_sum_is_cut(
    rows: Made, name: str, devices: str, gpus: int, kind: str
):
    wanted = rows(name, "cuda:0", kind=kind)
    np.testing.assert_array_equal(rows(name, devices, gpus, kind, exact=True), wanted)


def test_layer_by_layer_bits_do_not_change(rows: Made):
    wanted = rows("dense", "cuda:0")
    np.testing.assert_array_equal(rows("dense", "layers(cuda:0,cuda:0)"), wanted)
    np.testing.assert_array_equal(rows("dense", "layers(cuda:0,cuda:1)", 2), wanted)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dense", {"devices": "layers(cuda:0,cpu)"}),
        ("dense", {"devices": "cuda:0", "gpu_layers": 2}),
        ("dense", {"devices": "cpu", "gpu_layers": "1"}),
        ("dense", {"devices": "tensor(cuda:0,cuda:0)", "gpu_layers": 2}),
        ("experts", {"devices": "cuda:0", "cpu_moe": True}),
        ("experts", {"devices": "layers(cuda:0,cuda:0)", "cpu_moe": True}),
        ("experts", {"devices": "cuda:0", "cpu_moe": True, "gpu_layers": 2}),
    ],
)
def test_beside_the_cpu(rows: Made, name: str, options: dict[str, Any]):
    """With float activations, so that no rounding to int8 goes the other way."""
    wanted = rows(name, "cpu", activations="f32")
    assert error(rows(name, activations="f32", **options), wanted) <= 1e-7


def test_all_layers_on_the_gpu_are_one_device(rows: Made):
    for layers in ("all", 99, 3, "auto", -2):
        np.testing.assert_array_equal(
            rows("dense", "cuda:0", gpu_layers=layers), rows("dense", "cuda:0")
        )
    np.testing.assert_array_equal(rows("dense", "cuda:0", gpu_layers=0), rows("dense", "cpu"))
