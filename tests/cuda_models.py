"""CUDA backends on GPUs that are not there, and models that run on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_driver import H100, FakeDriver
from fake_nodes import FakeLibrary

import runtime
from runtime.backends.cuda.backend import CudaBackend
from runtime.backends.cuda.driver import DeviceInfo


def fake_cuda(
    file: Any = None, execute: bool = True, quick: bool = False, **options: Any
) -> CudaBackend:
    """A CUDA backend whose kernels run on the simulator; quick: on numpy_grid.py."""
    if execute and not quick:
        pytest.importorskip("greenlet", reason="the CUDA simulator needs greenlet")
    driver = options.pop("driver", None) or FakeDriver(execute=execute, quick=quick)
    options = {"host_packing": True} | options
    return CudaBackend(file, driver=driver, kernels=FakeLibrary(), **options)


def fake_gpus(gpus: int | Sequence[DeviceInfo] = 1) -> FakeDriver:
    """A driver of these, or of as many alike, whose kernels run on numpy_grid.py."""
    every = [H100] * gpus if isinstance(gpus, int) else gpus
    return FakeDriver([replace(each, index=n) for n, each in enumerate(every)], quick=True)


@contextmanager
def on_fake_gpus(
    path: Path, devices: str, gpus: int | Sequence[DeviceInfo] = 1, **options: Any
) -> Iterator[runtime.Model]:
    """A model on devices of an expression, GPUs among them."""
    driver = options.pop("driver", None) or fake_gpus(gpus)
    options = {"context": 64, "sequences": 1, "progress": False, "threads": 1} | options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.backends.cuda.opening.open_driver", lambda: driver)
        patch.setattr("runtime.backends.cuda.launcher.library", lambda target: FakeLibrary())
        with runtime.load(path, devices=devices, **options) as model:
            yield model


@contextmanager
def on_fake_cuda(path: Path, activations: str = "int8", **options: Any) -> Iterator[runtime.Model]:
    """A model on such a backend, by default a quick one; `backend`: what else it takes."""
    given = {"quick": True} | options.pop("backend", {})
    options = {"context": 64, "sequences": 1, "progress": False} | options

    def opened(devices: str, file: Any, *_: Any, **__: Any) -> CudaBackend:
        return fake_cuda(file, activations=activations, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.model.open_backend", opened)
        with runtime.load(path, **options) as model:
            yield model
