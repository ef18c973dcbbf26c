"""Opening GPUs by name, what `runtime devices` says of them, and what happens when one is lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cuda_models import on_fake_cuda
from fake_driver import H100, FakeDriver
from fake_nodes import FakeLibrary
from test_cuda_driver import CUresult, _api

from runtime.backends import devices
from runtime.backends.cuda import found
from runtime.backends.cuda.bindings import BoundDriver
from runtime.backends.cuda.driver import DeviceInfo, DeviceLostError
from runtime.cli import main
from runtime.ops import PAGE
from runtime.ops.errors import BackendError, MemoryLimitError

OLD = dataclasses.replace(H100, index=0, name="fake V100", capability=(7, 0))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeDriver]:
    """Makes the driver of this machine see GPUs."""

    def has(*infos: DeviceInfo) -> FakeDriver:
        driver = FakeDriver([dataclasses.replace(gpu, index=n) for n, gpu in enumerate(infos)])

        def opened() -> FakeDriver:
            if not infos:
                raise BackendError("the NVIDIA driver sees no GPU")
            return driver

        monkeypatch.setattr("runtime.backends.cuda.opening.open_driver", opened)
        for name in ("count", "gpus", "described"):
            monkeypatch.setattr(getattr(found, name), "__defaults__", (opened,))
        monkeypatch.setattr("runtime.backends.cuda.launcher.library", lambda _: FakeLibrary())
        return driver

    return has


@pytest.mark.parametrize(
    ("gpus", "expression", "name"),
    [
        ([H100], "cuda", "cuda:0 (fake H100)"),
        ([H100, H100], "cuda:1", "cuda:1 (fake H100)"),
        ([OLD, H100], "auto", "cuda:1 (fake H100)"),
        ([OLD], " AUTO ", "cpu"),
        ([], "auto", "cpu"),
    ],
)
def test_an_expression_opens_its_gpu(machine, gpus: list, expression: str, name: str):
    machine(*gpus)
    backend = devices.open_backend(expression, None, None, "int8")
    assert backend.name.startswith(name)
    assert devices.count("cuda") == len(gpus)
    backend.close()


@pytest.mark.parametrize(
    ("gpus", "expression", "says"),
    [
        ([], "cuda", "sees no GPU"),
        ([H100], "cuda:1", "no GPU cuda:1: the driver sees 1"),
        ([OLD], "cuda", "capability 7.0, and kernels exist for 8.0"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_one_line(machine, gpus: list, expression: str, says: str):
    machine(*gpus)
    with pytest.raises(BackendError, match=says) as error:
        devices.open_backend(expression, None, None, "int8")
    assert "\n" not in str(error.value)


def test_devices_are_shown_with_what_is_wrong(machine):
    machine(H100, OLD)
    shown = CliRunner().invoke(main, ["devices"]).stdout
    for part in ("cuda:0", "fake H100, 132", "9.0, kernels for sm_90a", "80.00 GiB in all, 80.00",
                 "supports CUDA 13.0", "not usable", "capability 7.0", "auto"):  # fmt: skip
        assert part in shown
    machine()
    assert "sees no GPU" in CliRunner().invoke(main, ["devices"]).stdout


def test_looking_at_gpus_leaves_nothing_behind(machine):
    driver = machine(H100, H100)
    assert [gpu.free_nbytes for gpu in found.gpus()] == [80 << 30] * 2
    assert not any(context.alive for context in driver._contexts.values())


def test_the_memory_of_the_gpu_decides_the_context(golden: Path):
    path = golden / "qwen3" / "model-f16.gguf"

    def model(nbytes: int, context: int | None = None, **options: Any) -> Any:
        driver = FakeDriver([dataclasses.replace(H100, total_nbytes=nbytes)])
        backend = {"driver": driver, "execute": False}
        return on_fake_cuda(path, backend=backend, context=context, **options)

    with model(80 << 30) as large:
        trained, need = large.context, large._engine.memory
    little = need.weights + 11 * need.page
    with model(little) as small:
        assert small.context == 9 * PAGE < trained
    with (
        pytest.raises(MemoryLimitError, match=r"on cuda:0 \(fake H100\): at most context=288 "),
        model(little, context=trained),
    ):
        pass
    with pytest.raises(MemoryLimitError, match="or more devices"), model(10 << 20):
        pass


def test_a_gpu_that_is_lost_ends_steps_and_not_closing(golden: Path):
    driver = FakeDriver()
    path = golden / "qwen3" / "model-f16.gguf"
    with on_fake_cuda(path, backend={"driver": driver, "execute": False}) as model:
        session = model.session()
        session.eval([1, 2])
        driver.lost = "an illegal memory access"
        for _ in range(2):
            with pytest.raises(DeviceLostError, match="cuda:0 is lost: an illegal memory access"):
                session.eval([3])
        assert len(session) == 2  # as it was before the step


def test_a_gpu_that_is_lost_is_one_line(machine, golden: Path, monkeypatch: pytest.MonkeyPatch):
    driver = machine(H100)

    def fails(*_: Any) -> None:
        driver.lost = "an illegal memory access"
        driver._check_lost()

    monkeypatch.setattr(driver, "launch_graph", fails)
    path = str(golden / "qwen3" / "model-f16.gguf")
    said = CliRunner().invoke(main, ["run", path, "-p", "hi", "--devices", "cuda"])
    last = said.stderr.strip().splitlines()[-1]
    assert said.exit_code == 1 and last == "error: cuda:0 is lost: an illegal memory access"


def test_what_has_no_room_on_a_gpu_is_left_to_the_cpu(machine, golden: Path):
    machine(dataclasses.replace(H100, total_nbytes=16 << 20))
    args = "run", str(golden / "qwen3" / "model-f16.gguf"), "-p", "hi", "-n", "1", "--devices"
    said = CliRunner().invoke(main, [*args, "cuda", "-c", "8"])
    assert said.exit_code == 1 and "no room" in said.stderr and "or -ngl" in said.stderr
    assert CliRunner().invoke(main, [*args, "cuda", "-ngl", "auto"]).exit_code == 0


def test_the_driver_remembers_that_a_context_is_lost():
    names = {"cuDeviceGet": (0, 0), "cuDeviceGetName": (0, b"H100\0"), "cuCtxSetCurrent": (0,)}
    kept = {"cuDevicePrimaryCtxRetain": (0, 7), "cuDevicePrimaryCtxRelease": (0,)}
    failing = {"cuStreamSynchronize": (CUresult.CUDA_ERROR_ILLEGAL_ADDRESS,)}
    text = {"cuGetErrorString": (0, b"an illegal memory access"), "cuMemFree": (0,)}
    driver = BoundDriver(_api(**names, **kept, **failing, **text))
    driver.use_context(driver.retain_context(0))
    for call in (driver.synchronize, driver.free):
        with pytest.raises(
            DeviceLostError, match=r"^cuda:0 \(H100\) is lost: cuStreamSynch.*load it"
        ):
            call(1)
    driver.release_context(0)  # which is what makes room for a new one
