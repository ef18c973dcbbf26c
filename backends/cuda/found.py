"""Which GPUs this machine has, and why one cannot be used."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.ops.errors import BackendError

from .driver import DeviceInfo, Driver
from .nccl import check_version
from .opening import open_driver
from .targets import target_of

_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver describes it. `target`: what its kernels are compiled for, or "".

    `free_nbytes`: None where it does not say. `problem`: why it cannot be used, or "".
    """

    info: DeviceInfo
    target: str
    free_nbytes: int | None
    problem: str = ""

    @property
    def index(self) -> int:
        """As in cuda:0."""
        return self.info.index

    def __str__(self) -> str:
        return f"cuda:{self.index} ({self.info.name})"


def count(opened: Callable[[], Driver] = open_driver) -> int:
    """How many GPUs the driver sees; 0 where there is no driver."""
    try:
        return opened().device_count()
    except BackendError:
        return 0


def gpus(opened: Callable[[], Driver] = open_driver) -> list[Gpu]:
    """All that the driver sees; none where there is no driver."""
    with contextlib.suppress(BackendError):
        driver = opened()
        return [_gpu(driver, index) for index in range(driver.device_count())]
    return []


def described(opened: Callable[[], Driver] = open_driver) -> dict[str, Any]:
    """Driver, devices and what stands in their way, as JSON values.

    `problem` is why there is none; each device has its own, "" where it can be used.
    """
    try:
        driver = opened()
    except BackendError as error:
        return {
            "driver": _driver(),
            "cuda": None,
            "devices": [],
            "nccl": None,
            "problem": str(error),
        }
    version = driver.version()
    return {
        "driver": _driver(),
        "cuda": f"{version // 1000}.{version % 1000 // 10}",
        "devices": [_as_data(_gpu(driver, index)) for index in range(driver.device_count())],
        "nccl": _nccl(driver) if driver.device_count() > 1 else None,
        "problem": "",
    }


def _nccl(driver: Driver) -> dict[str, Any]:
    """The library for sums over several GPUs."""
    try:
        return {"version": ".".join(map(str, check_version(driver.nccl()))), "problem": ""}
    except BackendError as error:
        return {"version": None, "problem": str(error)}


def _driver() -> str | None:
    """The version of the system's driver, such as "580.159.04"; None where it does not say."""
    try:
        found = re.search(r"\b\d{3}\.[\d.]+\d\b", _DRIVER.read_text())
    except OSError:
        return None
    return found[0] if found else None


def _gpu(driver: Driver, index: int) -> Gpu:
    info = driver.device_info(index)
    try:
        target = target_of(*info.capability)
    except BackendError as error:
        return Gpu(info, "", None, str(error))
    try:
        return Gpu(info, target, _free(driver, index))
    except BackendError as error:
        return Gpu(info, target, None, str(error))


def _free(driver: Driver, index: int) -> int:
    """Looking takes a context, some hundred MiB of the GPU, which is given back at once."""
    context = driver.retain_context(index)
    try:
        driver.use_context(context)
        return driver.memory_info()[0]
    finally:
        driver.release_context(index)


def _as_data(gpu: Gpu) -> dict[str, Any]:
    info = gpu.info
    return {
        "device": f"cuda:{info.index}",
        "name": info.name,
        "capability": ".".join(map(str, info.capability)),
        "target": gpu.target,
        "memory_total": info.total_nbytes,
        "memory_free": gpu.free_nbytes,
        "multiprocessors": info.multiprocessors,
        "problem": gpu.problem,
    }
