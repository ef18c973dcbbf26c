"""CUDA backends on GPUs that are not there, and models that run on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_driver import FakeDriver
from fake_nodes import FakeLibrary

import runtime
from runtime.backends.cuda.backend import CudaBackend


def fake_cuda(
    file: Any = None, execute: bool = True, quick: bool = False, **options: Any
) -> CudaBackend:
    """A CUDA backend whose kernels run on the simulator; quick: on numpy_grid.py."""
    if execute and not quick:
        pytest.importorskip("greenlet", reason="the CUDA simulator needs greenlet")
    driver = options.pop("driver", None) or FakeDriver(execute=execute, quick=quick)
    return CudaBackend(file, driver=driver, kernels=FakeLibrary(), **options)


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
