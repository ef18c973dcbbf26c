"""Opening NVIDIA's driver: what is missing is said in one line."""

from __future__ import annotations

import importlib
import re
from typing import Any

from runtime.ops.errors import BackendError

from .bindings import BoundDriver
from .driver import NEEDED_CUDA, NEEDED_DRIVER, Driver


def open_driver(api: Any = None) -> Driver:
    """NVIDIA's driver, initialised, with at least one GPU.

    `api`: what `cuda.bindings.driver` is by default. BackendError, one line that says what to do:
    cuda-bindings is not installed, there is no driver, it is too old, it sees no GPU.
    """
    driver = BoundDriver(api or _api())
    version = _started(driver.version)
    if version < NEEDED_CUDA:
        raise BackendError(
            f"the NVIDIA driver supports CUDA {version // 1000}.{version % 1000 // 10}, and "
            f"kernels need {NEEDED_CUDA // 1000}.{NEEDED_CUDA % 1000 // 10}: install driver "
            f"{NEEDED_DRIVER} or later, or use devices='cpu'"
        )
    _started(driver.initialize)
    if not driver.device_count():
        raise _no_device()
    return driver


def _api() -> Any:
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError:
        raise BackendError(
            "CUDA devices need the package cuda-bindings, which is not installed: "
            "pip install 'graph-runtime[cuda]', or use devices='cpu'"
        ) from None


def _started(call: Any) -> Any:
    """The first calls of a driver, which is where a missing one shows."""
    try:
        return call()
    except BackendError as error:
        if re.search("NO_DEVICE", str(error)):
            raise _no_device() from None
        if re.search("STUB_LIBRARY|SYSTEM_DRIVER_MISMATCH|COMPAT_NOT_SUPPORTED", str(error)):
            raise _no_driver(str(error)) from None
        raise
    except (RuntimeError, OSError) as error:  # cuda-bindings: the library or a function is missing
        raise _no_driver(str(error).strip().partition("\n")[0]) from None


def _no_driver(detail: str) -> BackendError:
    return BackendError(
        f"no usable NVIDIA driver ({detail}): install driver {NEEDED_DRIVER} or later, or use "
        "devices='cpu'"
    )


def _no_device() -> BackendError:
    return BackendError(
        "the NVIDIA driver sees no GPU: check CUDA_VISIBLE_DEVICES and nvidia-smi, or use "
        "devices='cpu'"
    )
