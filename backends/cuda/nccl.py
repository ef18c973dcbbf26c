"""NVIDIA's collectives, for sums that are too large for every device to read all parts.

Nothing uses them yet: sums of prompts over many cards will. Versions that write out of bounds are
refused, and so are several devices on one GPU, of which NCCL takes one.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Sequence
from typing import Any

from runtime.ops.errors import BackendError

NEEDED = 2, 27, 5  # earlier ones write behind the end of a buffer
_NAMES = ("libnccl.so.2", "libnccl.so")
_FLOAT32, _SUM = 7, 0  # ncclFloat32, ncclSum


class Nccl:
    """The library, one communicator for each GPU of this process."""

    def __init__(self, gpus: Sequence[int], library: Any = None) -> None:
        """gpus: their numbers, each once. library: by default the one installed.

        BackendError: it is not there, is too old, or fails.
        """
        if len(set(gpus)) < len(gpus):
            raise BackendError(f"NCCL takes a GPU once, and these are cuda:{list(gpus)}")
        self._library = library if library is not None else _loaded()
        check_version(self._library)
        self._communicators = (ctypes.c_void_p * len(gpus))()
        numbers = (ctypes.c_int * len(gpus))(*gpus)
        self._call("ncclCommInitAll", self._communicators, len(gpus), numbers)

    def sum(self, sources: Sequence[int], targets: Sequence[int], count: int, streams: Any) -> None:
        """Of `count` float32 at `sources`, of each GPU one address, the sums at `targets`.

        streams: of each GPU the handle, in whose order it happens.
        """
        self._call("ncclGroupStart")
        each = zip(sources, targets, self._communicators, streams, strict=True)
        for source, target, communicator, stream in each:
            self._call(
                "ncclAllReduce", ctypes.c_void_p(source), ctypes.c_void_p(target),
                ctypes.c_size_t(count), _FLOAT32, _SUM, ctypes.c_void_p(communicator),
                ctypes.c_void_p(int(stream)),
            )  # fmt: skip
        self._call("ncclGroupEnd")

    def close(self) -> None:
        """Give the communicators back."""
        for communicator in self._communicators:
            self._call("ncclCommDestroy", ctypes.c_void_p(communicator))
        self._communicators = (ctypes.c_void_p * 0)()

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._library, name)(*arguments):
            raise BackendError(f"{name} failed with code {code}")


def check_version(library: Any) -> tuple[int, int, int]:
    """The version of a loaded library. BackendError: it is older than NEEDED."""
    found = ctypes.c_int()
    if code := library.ncclGetVersion(ctypes.byref(found)):
        raise BackendError(f"ncclGetVersion failed with code {code}")
    n = found.value
    version = (
        (n // 1000, n // 100 % 10, n % 100) if n < 10000 else (n // 10000, n // 100 % 100, n % 100)
    )
    if version < NEEDED:
        raise BackendError(
            f"NCCL {'.'.join(map(str, version))} writes out of bounds: install "
            f"{'.'.join(map(str, NEEDED))} or later (pip install nvidia-nccl-cu13)"
        )
    return version


def _loaded() -> Any:
    for name in _NAMES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise BackendError("NCCL is not installed: pip install nvidia-nccl-cu13")
