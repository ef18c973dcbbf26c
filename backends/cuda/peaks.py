"""What this machine's GPUs give at best, measured once and remembered beside the kernels."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime.backends.cuda.kernels import peaks as kernels
from runtime.backends.cuda.launcher import Device, Launch, Stream
from runtime.backends.environment import cache_dir
from runtime.backends.plan.entries import replace
from runtime.backends.plan.kernel import Kernel

COPY = Kernel.of("peak_copy")
MMA = {kind: Kernel.of("peak_mma", kind=kind) for kind in kernels.OPERATIONS}
_COPIED = 1 << 30  # bytes, far beyond any cache
_ROUNDS, _BLOCKS = 4096, 8  # of products; blocks of each multiprocessor
_REPEATS = 10


@dataclass(frozen=True)
class Peaks:
    """copy: bytes read plus bytes written per second; int8, f16: operations of the tensor cores
    per second, a product and a sum being two. NaN from a driver without a GPU."""

    copy: float
    int8: float
    f16: float

    @property
    def known(self) -> bool:
        """Whether all were measured."""
        return all(math.isfinite(value) and value > 0 for value in asdict(self).values())


def file() -> Path:
    """Where measurements are kept."""
    return cache_dir() / "gpu-peaks.json"


def peaks(device: Device, again: bool = False) -> Peaks:
    """Of a GPU as measured before, or now; `again`: now. BackendError: kernels are missing."""
    key = f"{device.info.name}, driver with CUDA {device.driver.version()}"
    known = _all()
    with contextlib.suppress(KeyError, TypeError, ValueError):
        if not again and (found := Peaks(**known[key])).known:
            return found
    found = measured(device)
    if found.known:
        with contextlib.suppress(OSError):
            replace(file(), json.dumps({**known, key: asdict(found)}, indent=1).encode())
    return found


def measured(device: Device) -> Peaks:
    """Now: takes a second, and 2 GiB of the GPU, less where less is free."""
    device.activate()
    device.prepare([COPY, *MMA.values()])
    with device.stream() as stream:
        copy = _copy(device, stream)
        products = [_products(device, stream, kind) for kind in ("s8", "f16")]
    return Peaks(copy, *products)


def seconds(device: Device, stream: Stream, launch: Launch) -> float:
    """The device's time for a launch, the best of some."""
    best = math.inf
    with device.event() as start, device.event() as end:
        for _ in range(_REPEATS):
            start.record(stream)
            launch.run(stream)
            end.record(stream)
            end.synchronize()
            best = min(best, end.since(start))
    return best if math.isfinite(best) and best > 0 else math.nan


def _copy(device: Device, stream: Stream) -> float:
    block = 16 * kernels.COPIED * kernels.COPY_THREADS
    blocks = max(1, min(_COPIED, device.memory_info()[0] // 4) // block)
    with device.arena(2 * blocks * block, "copy") as arena:
        source, target = arena.take(blocks * block), arena.take(blocks * block)
        source.fill(0x5A, stream)
        took = seconds(device, stream, device.launch(COPY, blocks, source, target))
        stream.synchronize()
    return 2 * blocks * block / took


def _products(device: Device, stream: Stream, kind: str) -> float:
    blocks = _BLOCKS * device.info.multiprocessors
    threads = blocks * kernels.MMA_THREADS
    with device.arena(4 * threads, "products") as arena:
        out = arena.take(4 * threads)
        took = seconds(device, stream, device.launch(MMA[kind], blocks, out, _ROUNDS))
        stream.synchronize()
    done = threads // 32 * _ROUNDS * kernels.CHAINS * kernels.OPERATIONS[kind]
    return done / took


def _all() -> dict[str, Any]:
    try:
        found = json.loads(file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
