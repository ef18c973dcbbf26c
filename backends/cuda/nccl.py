"""NVIDIA's collectives, for sums that are too large for every device to read all parts.

One process, several GPUs: a communicator for each, and a sum is one group of calls, each in the
order of its GPU's stream. Versions that write out of bounds are refused, and so are several devices
on one GPU, of which NCCL takes one: these have sums of their own (see kernels/collective.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.backends.environment import nccl_from
from runtime.ops.errors import BackendError

if TYPE_CHECKING:
    from runtime.backends.cuda.launcher import Device, Stream

NEEDED = 2, 27, 5  # earlier ones write behind the end of a buffer
FROM = 1 << 20  # bytes of the smallest sum that is NCCL's; a guess, no two GPUs were at hand
_MOST_TRIED = 64 << 20  # bytes of the sum that proves that it works
_NAMES = ("libnccl.so.2", "libnccl.so")
_ONE_BYTE = 0x3E  # four of them are a float32 of 0.186
_FLOAT32, _SUM = 7, 0  # ncclFloat32, ncclSum
_INSTALL = "pip install nvidia-nccl-cu13"


class Nccl:
    """The library, one communicator for each GPU of this process."""

    def __init__(self, gpus: Sequence[int], library: Any = None) -> None:
        """gpus: their numbers, each once. library: by default the one installed.

        BackendError: it is not there, is too old, or fails.
        """
        if len(set(gpus)) < len(gpus):
            raise BackendError(f"NCCL takes a GPU once, and these are cuda:{list(gpus)}")
        self._library = library if library is not None else loaded()
        self.version = check_version(self._library)
        self._communicators = (ctypes.c_void_p * len(gpus))()
        numbers = (ctypes.c_int * len(gpus))(*gpus)
        self._call("ncclCommInitAll", self._communicators, len(gpus), numbers)

    def sum(self, sources: Sequence[int], targets: Sequence[int], count: int, streams: Any) -> None:
        """Of `count` float32 at `sources`, of each GPU one address, the sums at `targets`.

        streams: of each GPU the handle, in whose order it happens. The current context may be
        another one afterwards.
        """
        with self._group():
            each = zip(sources, targets, self._communicators, streams, strict=True)
            for source, target, communicator, stream in each:
                self._call(
                    "ncclAllReduce", ctypes.c_void_p(source), ctypes.c_void_p(target),
                    ctypes.c_size_t(count), _FLOAT32, _SUM, ctypes.c_void_p(communicator),
                    ctypes.c_void_p(int(stream)),
                )  # fmt: skip

    def close(self) -> None:
        """Give the communicators back; their streams were waited for."""
        communicators, self._communicators = self._communicators, (ctypes.c_void_p * 0)()
        for communicator in communicators:
            self._call("ncclCommDestroy", ctypes.c_void_p(communicator))

    @contextlib.contextmanager
    def _group(self) -> Iterator[None]:
        """Calls that begin together; a group that failed is ended too."""
        self._call("ncclGroupStart")
        try:
            yield
        except BaseException:
            self._library.ncclGroupEnd()
            raise
        self._call("ncclGroupEnd")

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._library, name)(*arguments):
            raise BackendError(f"{name} failed with code {code}{self._said(code)}")

    def _said(self, code: int) -> str:
        explain = self._library.ncclGetErrorString
        explain.restype = ctypes.c_char_p
        text = explain(code)
        return f" ({text.decode()})" if isinstance(text, bytes) else ""


def opened(devices: Sequence[Device], streams: Sequence[Stream]) -> tuple[Nccl | None, str]:
    """NCCL for these devices, or None and why not; "" where it could not be wanted.

    It sums once, so that what it takes of the GPUs is gone before their memory is shared out.
    """
    least, gpus = nccl_from(FROM), [device.index for device in devices]
    if len(set(gpus)) < len(gpus) or least is None:
        return None, ""
    nccl = None
    try:
        nccl = Nccl(gpus, devices[0].driver.nccl())
        _prove(nccl, devices, streams, min(least, _MOST_TRIED))
    except BackendError as error:
        with contextlib.suppress(BackendError):
            if nccl is not None:
                nccl.close()
        return None, f"sums of prompts are the GPUs' own: {error}"
    return nccl, ""


@cache
def tell(text: str) -> None:
    """On stderr, once."""
    if text and sys.stderr is not None:
        print(text, file=sys.stderr)


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
            f"{'.'.join(map(str, NEEDED))} or later ({_INSTALL})"
        )
    return version


def loaded() -> Any:
    """The library: of the package that pip installs, or the system's. BackendError: neither."""
    for path in (*_installed(), *_NAMES):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(path)
    raise BackendError(f"NCCL is not installed: {_INSTALL}")


def _installed() -> list[str]:
    try:
        spec = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        return []
    places = (spec and spec.submodule_search_locations) or []
    return [str(Path(place) / "lib" / _NAMES[0]) for place in places]


def _prove(nccl: Nccl, devices: Sequence[Device], streams: Sequence[Stream], nbytes: int) -> None:
    """One sum in place. BackendError: it is wrong; MemoryLimitError: no room."""
    count, found = -(-nbytes // 4), np.zeros(1, np.float32)
    with contextlib.ExitStack() as rooms:
        arenas = [rooms.enter_context(device.arena(4 * count, "a sum")) for device in devices]
        buffers = [arena.take(4 * count) for arena in arenas]
        for device, buffer, stream in zip(devices, buffers, streams, strict=True):
            device.activate()
            buffer.fill(_ONE_BYTE, stream)
        addresses = [buffer.address for buffer in buffers]
        nccl.sum(addresses, addresses, count, [stream.handle for stream in streams])
        each = float(np.frombuffer(bytes([_ONE_BYTE] * 4), np.float32)[0])
        for device, buffer, stream in zip(devices, buffers, streams, strict=True):
            device.activate()
            last = buffer.view(4 * (count - 1)).read(found, stream)[0]
            right = abs(last / (len(devices) * each) - 1) <= 1e-6
            if last and not right:  # 0: a driver without contents
                raise BackendError(f"NCCL's sum of {len(devices)} x {each} is {last}")
