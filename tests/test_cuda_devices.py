"""Models on several CUDA devices, virtual ones among them, and on GPUs beside the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cuda_models import on_fake_gpus
from fake_driver import H100
from small_models import Sizes, write_model

from runtime.backends import offload
from runtime.backends.base import Room
from runtime.backends.cuda.backend import CudaBackend
from runtime.backends.meta.choices import chosen
from runtime.backends.meta.expression import Device
from runtime.backends.meta.rooms import as_one
from runtime.backends.meta.stages import text
from runtime.backends.offload import offloaded
from runtime.engine import batch
from runtime.errors import MemoryLimitError

SIZE = {"hidden": 32, "inner": 64, "vocabulary": 32}
MODELS = {
    "short": Sizes("qwen3", layers=1, **SIZE),
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
        ("short", "tensor(cuda:0,cuda:0)", 1),
        ("three heads", "tensor(cuda:0,2*cuda:1,cuda:0)", 2),
        ("dense", "layers(cuda:1,tensor(3*cuda:0,cuda:0))", 2),
    ],
)
def test_sums_of_parts(rows: Made, name: str, devices: str, gpus: int):
    assert error(rows(name, devices, gpus), rows(name, "cuda:0")) <= 1e-10


@pytest.mark.parametrize(
    ("name", "devices", "gpus", "kind"),
    [
        ("short", "tensor(3*cuda:0,cuda:1)", 2, "Q8_0"),
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
    np.testing.assert_array_equal(rows("dense", "layers(cuda:0,cuda:1)", 2), wanted)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dense", {"devices": "layers(cuda:0,cpu)"}),
        ("dense", {"devices": "cpu", "gpu_layers": "2"}),
        ("experts", {"devices": "layers(cuda:0,cuda:0)", "cpu_moe": True}),
        ("experts", {"devices": "cuda:0", "cpu_moe": True, "gpu_layers": 2}),
    ],
)
def test_beside_the_cpu(rows: Made, name: str, options: dict[str, Any]):
    """With float activations, so that no rounding to int8 goes the other way."""
    wanted = rows(name, "cpu", activations="f32")
    assert error(rows(name, activations="f32", **options), wanted) <= 1e-7


def test_states_are_as_one_device_has_them(tmp_path: Path):
    """Pages of all, written to devices that each have some heads, and read from them."""
    path, rng = write_model(tmp_path / "m.gguf", MODELS["three heads"]), np.random.default_rng(3)
    found: dict[str, list[np.ndarray]] = {}
    for devices in ("cuda:0", "tensor(cuda:0,2*cuda:0)", "tensor(cuda:0,cuda:0,cuda:0)"):
        with on_fake_gpus(path, devices) as model:
            model.eval(PROMPT)
            for leaf in model.graph(1).leaves("state"):
                first = found.setdefault(leaf.name, [rng.standard_normal((2, *leaf.shape[1:]))])
                read = model.backend.read_state(leaf, [0])
                model.backend.write_state(leaf, [2, 0], first[0])
                model.backend.copy_pages([leaf], [0], [1])
                first += [read, model.backend.read_state(leaf, [2, 1])]
    for _, once, back, *others in found.values():
        assert np.abs(once).max() > 0.1
        for read, written in zip(others[::2], others[1::2], strict=True):
            assert error(read[:, : len(PROMPT)], once[:, : len(PROMPT)]) <= 1e-5  # float16
            np.testing.assert_array_equal(written, back)


LAYERS = {f"blk.{n}.{kind}.weight": (1000, 2 + (kind == "x")) for n in range(4) for kind in "wx"}
FILE = SimpleNamespace(
    tensors={
        name: SimpleNamespace(nbytes=nbytes, shape=(1,) * ndim)
        for name, (nbytes, ndim) in {**LAYERS, "output.weight": (500, 2)}.items()
    }
)


@pytest.mark.parametrize(
    ("devices", "gpu_layers", "cpu_moe", "free", "want"),
    [
        ("cuda:0", "all", False, 0, ("cuda:0", None)),
        ("cuda:0", 5, False, 0, ("cuda:0", None)),
        ("cuda:0", -2, 3, 0, ("cuda:0", (None, 3))),
        ("cuda:0", "4", 1, 0, ("cuda:0", (4, 1))),
        ("tensor(cuda:0,cuda:1)", 1, False, 0, ("tensor(cuda:0,cuda:1)", (1, 0))),
        ("cuda:0", 0, True, 0, ("cpu", None)),
        ("cpu", 2, False, 0, ("cuda:7", (2, 0))),
        ("cpu", 0, False, 0, ("cpu", None)),
        ("cpu", None, True, 0, ("cpu", None)),
        ("cuda:0", "auto", False, 20_000, ("cuda:0", None)),
        ("cuda:0", "auto", False, 6_000, ("cuda:0", (3, 0))),
        ("layers(cuda:0,cuda:1)", -1, False, 3_000, ("layers(cuda:0,cuda:1)", (3, 0))),
        ("tensor(cuda:0,cuda:0)", "auto", False, 3_000, ("tensor(cuda:0,cuda:0)", (1, 0))),
        ("cuda:0", "auto", True, 6_000, ("cuda:0", (None, 1 << 30))),
        ("cuda:0", "auto", False, 700, ("cuda:0", (1, 0))),
        ("cuda:0", "auto", False, 600, ("cpu", None)),
    ],
)  # fmt: skip
def test_which_layers_and_experts_the_cpu_has(devices, gpu_layers, cpu_moe, free, want):
    stages, host = offloaded(
        devices, chosen(devices), FILE, gpu_layers, cpu_moe, lambda: Device("cuda", 7),
        lambda device: free + offload._FIXED / offload._SHARE,
    )  # fmt: skip
    assert (text(stages), host if host is None else tuple(host)) == want


def test_layers_for_a_gpu_that_is_not_there_are_the_cpus(capsys: pytest.CaptureFixture[str]):
    stages, host = offloaded("cpu", chosen("cpu"), FILE, 9, True, lambda: None, lambda _: 0)
    assert (text(stages), host) == ("cpu", None)
    assert capsys.readouterr().err.startswith("gpu_layers=9: no GPU can be used here")
    assert offloaded("cpu", chosen("cpu"), FILE, None, True, lambda: None, lambda _: 0)[1] is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("rooms", "pages"),
    [
        ([Room("a", 1000, 200, 10), Room("b", 500, 200, 10)], 30),
        ([Room("a", 1000, 200, 10), Room("a", 1000, 200, 20)], 20),
        ([Room("a", 1000, 200, 0), Room("b", 500, 200, 10)], 30),
        ([Room("a", 100, 200, 10), Room("b", 500, 200, 10)], -5),
        ([Room("a", 100, 200, 0), Room("b", 500, 200, 10)], -10),
    ],
)
def test_memories_have_room_for_as_many_pages_as_the_fullest(rooms: list[Room], pages: int):
    free, taken = as_one(rooms)
    assert free - taken == pages * sum(room.page for room in rooms)
    assert taken == sum(room.taken for room in rooms)


def test_a_context_that_one_of_several_gpus_has_no_room_for(tmp_path: Path):
    path = write_model(tmp_path / "m.gguf", MODELS["dense"])
    small = replace(H100, total_nbytes=300 << 20)
    for devices in ("tensor(cuda:0,cuda:1)", "layers(cuda:0,cuda:1)", "layers(cuda:1,cpu)"):
        with (
            pytest.raises(MemoryLimitError, match=r"context=9000000 needs .* on .*cuda:1"),
            on_fake_gpus(path, devices, [H100, small], context=9_000_000),
        ):
            pass


def test_threads_are_the_cpus(tmp_path: Path):
    path = write_model(tmp_path / "m.gguf", MODELS["dense"])
    with on_fake_gpus(path, "layers(3*cuda:0,cpu)", threads=4) as model:
        of_cpu = [b.threads for b in model.backend._devices if b.name.startswith("cpu")]
        assert of_cpu == [4]
