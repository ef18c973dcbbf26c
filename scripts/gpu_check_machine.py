"""The GPU itself: what it is, whether kernels load, what launches cost. NaN without a GPU."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any

from gpu_check_setup import Check, Row

from runtime.backends.cuda.arena import Arena
from runtime.backends.cuda.catalogue import KERNELS
from runtime.backends.cuda.found import described
from runtime.backends.cuda.graphs import Graph, chain
from runtime.backends.cuda.launcher import Device, Launch, Stream
from runtime.backends.cuda.library import TOOLCHAIN
from runtime.backends.cuda.peaks import measured
from runtime.backends.plan.kernel import Kernel
from runtime.ops.errors import Error

_TINY = Kernel.of("normalize")


def machine(check: Check) -> Iterator[Row]:
    """The GPU, its driver, the packages, and what it gives at best."""
    with check.device() as device:
        info, (free, total) = device.info, device.memory_info()
        yield {
            "name": "gpu", "gpu": info.name, "capability": list(info.capability),
            "target": device.target, "multiprocessors": info.multiprocessors,
            "clock_mhz": info.clock_khz / 1e3, "l2_mb": info.l2_nbytes / 1e6,
            "memory_gb": total / 1e9, "free_gb": free / 1e9,
        }  # fmt: skip
        found = {} if check.dry else described()
        cuda = device.driver.version()
        yield {"name": "driver", "version": found.get("driver"), "cuda": cuda}
        yield {"name": "packages", "python": platform.python_version(), **_versions()}
        best = measured(device)
        rates = {
            "copy_gb_per_s": best.copy / 1e9, "int8_tops": best.int8 / 1e12,
            "f16_tflops": best.f16 / 1e12,
        }  # fmt: skip
        yield {"name": "peaks"} | (dict.fromkeys(rates, math.nan) if check.dry else rates)


def _versions() -> dict[str, str]:
    found = {}
    for name in (*TOOLCHAIN, "cuda-bindings", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def loading(check: Check) -> Iterator[Row]:
    """All kernels into the GPU; each that the driver refuses is a row."""
    from runtime.backends.cuda.library import library

    kernels, absent, start = KERNELS.every(), 0, time.monotonic()
    with check.device() as device:
        if not check.dry:
            kept = library(device.target)
            absent = len(kept.missing(kernels))
            kept.prepare(kernels)
        ready, refused = time.monotonic(), 0
        for kernel in kernels:
            try:
                device.function(kernel)
            except Error as error:
                refused += 1
                yield {"name": str(kernel), "says": str(error), "right": False}
        times = {"prepare_s": ready - start, "load_s": time.monotonic() - ready}
    times = dict.fromkeys(times, math.nan) if check.dry else times
    counts = {"kernels": len(kernels), "compiled_here": absent, "refused": refused}
    yield {"name": "all", **counts, **times, "right": not refused}


def launches(check: Check) -> Iterator[Row]:
    """Microseconds of host time per launch by route; of the device per node of a graph."""
    count = 3 if check.dry else 300
    with check.device() as device, device.stream() as stream, device.arena(1 << 24) as arena:
        clock = Clock(device, stream, check.dry)
        tiny = _tiny(device, stream, arena, 256, count)
        yield from _routes(clock, tiny)
        free, _ = device.memory_info()
        with Graph(device, tiny, chain(count)) as graph:
            graph.replay(stream)
            stream.synchronize()
            taken = free - device.memory_info()[0]
            host = clock.host(lambda: graph.replay(stream), 5)
            yield {"name": "replay of 300 nodes", "host_us_per_node": 1e6 * host / count,
                   "memory_bytes_per_node": taken / count}  # fmt: skip
        yield from _gaps(clock, arena, count)


def _routes(clock: Clock, tiny: list[Launch]) -> Iterator[Row]:
    one, stream, device = tiny[0], clock.stream, clock.device
    with Graph(device, tiny[:1]) as graph:
        routes: dict[str, Callable[[], Any]] = {
            "launch": lambda: one.run(stream),
            "programmatic launch": lambda: one.run(stream, True),
            "replay of 1 node": lambda: graph.replay(stream),
        }
        for name, call in routes.items():
            yield {"name": name, "host_us": 1e6 * clock.host(call, 200)}
    for name, early in (("launches", False), ("programmatic launches", True)):
        took = clock.device_seconds(lambda e=early: [launch.run(stream, e) for launch in tiny])
        yield {"name": f"{name}, finished", "us_each": 1e6 * took / len(tiny)}


def _gaps(clock: Clock, arena: Arena, count: int) -> Iterator[Row]:
    """Work cut into `count` nodes against the same work in one."""
    elements = 256 if count < 10 else 2048
    cut = _tiny(clock.device, clock.stream, arena, elements, count)
    (alone,) = _tiny(clock.device, clock.stream, arena, elements * count, 1)
    for name, early in (("plain", False), ("programmatic", True)):
        taken = []
        for launches in ([alone], cut):
            with Graph(clock.device, launches, chain(len(launches), early)) as graph:
                taken.append(clock.device_seconds(lambda g=graph: g.replay(clock.stream)))
                clock.stream.synchronize()
        gap = (taken[1] - taken[0]) / (count - 1)
        yield {"name": f"a node more, {name} edges", "us": math.nan if clock.dry else 1e6 * gap}


class Clock:
    """Times of a device and of the host that drives it, the best of some; NaN without a GPU."""

    def __init__(self, device: Device, stream: Stream, dry: bool) -> None:
        self.device, self.stream, self.dry = device, stream, dry

    def host(self, call: Callable[[], Any], calls: int) -> float:
        """Seconds of the host for one call, before the driver's queue fills."""
        best = math.inf
        for _ in range(1 if self.dry else 20):
            start = time.perf_counter()
            for _ in range(1 if self.dry else calls):
                call()
            best = min(best, (time.perf_counter() - start) / calls)
            self.stream.synchronize()
        return math.nan if self.dry else best

    def device_seconds(self, work: Callable[[], Any]) -> float:
        """Seconds of the device for what `work` gives to the stream."""
        best = math.inf
        with self.device.event() as start, self.device.event() as end:
            for _ in range(1 if self.dry else 20):
                if not self.dry:
                    work()  # keeps the device busy while the host gives it the rest
                start.record(self.stream)
                work()
                end.record(self.stream)
                end.synchronize()
                best = min(best, end.since(start))
        return math.nan if self.dry else best


def _tiny(device: Device, stream: Stream, arena: Arena, elements: int, count: int) -> list[Launch]:
    """One warp each that goes through its own `elements` numbers in turn."""
    x, out = arena.take(4 * elements * count), arena.take(4 * elements * count)
    x.fill(0, stream)
    places = [(x.view(4 * elements * i), out.view(4 * elements * i)) for i in range(count)]
    return [device.launch(_TINY, 1, *place, elements, elements) for place in places]
