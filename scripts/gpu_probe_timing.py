"""Times on a GPU: launches by route, nodes of a graph, bandwidth, products. NaN without a GPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from gpu_probe_arrays import random_blocks
from gpu_probe_cases import PACK, TILE, Case

from runtime.backends.cuda import layouts
from runtime.backends.cuda.arena import Arena, Buffer
from runtime.backends.cuda.graphs import Graph, chain
from runtime.backends.cuda.kernels.matvec import rows_of
from runtime.backends.cuda.launcher import Device, Launch, Stream
from runtime.backends.plan.kernel import Kernel

NAN = math.nan
# int8 operations of the tensor cores per clock and multiprocessor, without sparsity
INT8_OPS = {(8, 0): 4096, (8, 6): 2048, (8, 9): 2048, (9, 0): 8192, (10, 0): 16384, (12, 0): 2048}
PACKED_ROWS = 1024  # made by numpy; larger matrices repeat them


class Gpu:
    """A device with a stream, and how long things take on it.

    `small`: no GPU is behind it, so everything is done once and no time is real.
    """

    def __init__(self, device: Device) -> None:
        self.device, self.stream, self.small = device, device.stream(), device.driver.fake
        self._start, self._end = device.event(), device.event()

    def seconds(self, work: Callable[[], Any], repeats: int = 10) -> float:
        """The device's time for what `work` gives to the stream: the best of some."""
        best = math.inf
        for _ in range(1 if self.small else repeats + 2):
            if not self.small:
                work()  # keeps the device busy while the host gives it the rest
            self._start.record(self.stream)
            work()
            self._end.record(self.stream)
            self._end.synchronize()
            best = min(best, self._end.since(self._start))
        return NAN if self.small else best

    def host_seconds(self, call: Callable[[], Any], calls: int = 200) -> float:
        """The host's time for one call, before the driver's queue fills: the best of some."""
        best = math.inf
        for _ in range(1 if self.small else 20):
            start = time.perf_counter()
            for _ in range(1 if self.small else calls):
                call()
            best = min(best, (time.perf_counter() - start) / calls)
            self.stream.synchronize()
        return NAN if self.small else best

    def graph_seconds(self, launches: list[Launch], programmatic: bool, repeats: int = 10) -> float:
        """Of one launch in a graph that runs them one after another."""
        edges = chain(len(launches), programmatic)
        with Graph(self.device, launches, edges) as graph:
            total = self.seconds(lambda: graph.replay(self.stream), repeats)
            self.stream.synchronize()
        return total / len(launches)


def placed(gpu: Gpu, arena: Arena, case: Case) -> tuple[dict[str, Buffer], list[Launch]]:
    """The case's arrays on the device, and its launches."""
    buffers = {name: arena.upload(array, gpu.stream) for name, array in case.arrays.items()}
    launches = []
    for kernel, grid, arguments in case.steps:
        values = [buffers[a] if isinstance(a, str) else a for a in arguments]
        launches.append(gpu.device.launch(kernel, grid, *values))
    return buffers, launches


def copy_bandwidth(gpu: Gpu) -> float:
    """Bytes per second read plus written by the driver's copy of 1 GiB, far beyond the L2 cache."""
    nbytes = 1 << 12 if gpu.small else min(1 << 30, gpu.device.memory_info()[0] // 4)
    with gpu.device.arena(2 * nbytes + 512, "copy") as arena:
        source, target = arena.take(nbytes), arena.take(nbytes)
        source.fill(1, gpu.stream)
        copy = gpu.device.driver.copy
        handle = gpu.stream.handle
        took = gpu.seconds(lambda: copy(target.address, source.address, nbytes, handle), 20)
    return 2 * nbytes / took


def _tiny(gpu: Gpu, arena: Arena, elements: int, count: int) -> list[Launch]:
    """One block each that reads its own `elements` numbers in turn."""
    kernel = Kernel.of("argmax_parts")
    x, values, ids = arena.take(4 * elements * count), arena.take(256), arena.take(256)
    x.fill(0, gpu.stream)
    return [
        gpu.device.launch(kernel, 1, x.view(4 * elements * i), values, ids, elements)
        for i in range(count)
    ]


def launch_costs(gpu: Gpu) -> dict[str, float]:
    """Microseconds of host time per launch by route, and of the device where it cannot keep up."""
    count = 3 if gpu.small else 300
    with gpu.device.arena(1 << 20, "launches") as arena:
        launches = _tiny(gpu, arena, 256, count)
        one, stream = launches[0], gpu.stream
        found = {
            "launch": gpu.host_seconds(lambda: one.run(stream)),
            "programmatic launch": gpu.host_seconds(lambda: one.run(stream, True)),
            "launch with a changed argument": gpu.host_seconds(lambda: _changed(one, stream)),
            "launches, finished": gpu.seconds(lambda: [a.run(stream) for a in launches]) / count,
        }
        with Graph(gpu.device, launches[:1]) as graph:
            found["replay of 1 node"] = gpu.host_seconds(lambda: graph.replay(stream), 100)
        with Graph(gpu.device, launches, chain(count)) as graph:
            call = gpu.host_seconds(lambda: graph.replay(stream), 5)
            found["replay of 300 nodes, per node"] = call / count
            found["update of a node"] = gpu.host_seconds(lambda: graph.update(0), 100)
            stream.synchronize()
    return {name: 1e6 * seconds for name, seconds in found.items()}


def _changed(launch: Launch, stream: Stream) -> None:
    launch.set(n=256)
    launch.run(stream)


def node_gaps(gpu: Gpu) -> dict[str, float]:
    """Microseconds that a node adds: work cut into 300 launches against the same work in one."""
    count, elements = (3, 256) if gpu.small else (300, 2048)
    with gpu.device.arena(4 * elements * count + 4096, "gaps") as arena:
        launches = _tiny(gpu, arena, elements, count)
        whole = gpu.device.launch(launches[0].kernel, 1, *_arguments(launches[0]), elements * count)
        alone = gpu.graph_seconds([whole], False, 20)
        found = {}
        for name, programmatic in (("plain", False), ("programmatic", True)):
            cut = count * gpu.graph_seconds(launches, programmatic, 20)
            found[name] = 1e6 * (cut - alone) / (count - 1)
    return found


def _arguments(launch: Launch) -> list[Buffer]:
    return [launch.buffers[name] for name in ("x", "values", "ids")]


def case_seconds(gpu: Gpu, case: Case) -> float:
    """Of a case's launches one after another with programmatic edges, its data in the cache."""
    with gpu.device.arena(case.nbytes + (1 << 20), "case") as arena:
        _, launches = placed(gpu, arena, case)
        runs = 1 if gpu.small else 20
        took = len(launches) * gpu.graph_seconds(launches * runs, True)
        gpu.stream.synchronize()
    return took


def matvec_speed(gpu: Gpu, format: str, rows: int, k: int) -> dict[str, Any]:
    """One column against weights that the L2 cache cannot hold, seconds and bytes per launch."""
    rng = np.random.default_rng(1)
    planes, row_nbytes = _planes(rng, format, min(rows, PACKED_ROWS), k)
    x, meta = layouts.quantize(rng.standard_normal((1, k), np.float32))
    nbytes = rows * row_nbytes
    enough = -(-8 * gpu.device.info.l2_nbytes // nbytes)
    copies = 2 if gpu.small else max(enough, 4)
    with gpu.device.arena(copies * (nbytes + 4096) + 8 * rows + (1 << 20), "weights") as arena:
        inputs = arena.upload(x, gpu.stream), arena.upload(meta, gpu.stream)
        out, launches = arena.take(4 * rows), []
        kernel, grid = Kernel.of("matvec", format=format, columns=1), -(-rows // rows_of(format, 1))
        for _ in range(copies):
            weights = [repeated(gpu, arena, plane, rows) for plane in planes]
            values = *weights, *inputs, out, rows, k // 32, rows
            launches.append(gpu.device.launch(kernel, grid, *values))
        plain, early = (gpu.graph_seconds(launches, p) for p in (False, True))
        gpu.stream.synchronize()
    moved = nbytes + x.nbytes + meta.nbytes + 4 * rows
    return {"copies": copies, "nbytes": moved, "plain_s": plain, "seconds": early}


def _planes(
    rng: np.random.Generator, format: str, rows: int, k: int
) -> tuple[list[np.ndarray], int]:
    """Packed rows, and the bytes of one."""
    planes = list(PACK[format](random_blocks(rng, format, rows, k)))
    return planes, sum(plane.nbytes // rows for plane in planes)


def repeated(gpu: Gpu, arena: Arena, plane: np.ndarray, rows: int) -> Buffer:
    """A plane of `rows` rows made of the given ones over and over."""
    nbytes = plane.nbytes // len(plane) * rows
    buffer = arena.take(nbytes)
    buffer.view(0, min(plane.nbytes, nbytes)).write(plane, gpu.stream)
    done, copy = plane.nbytes, gpu.device.driver.copy
    while done < nbytes:
        part = min(done, nbytes - done)
        copy(buffer.address + done, buffer.address, part, gpu.stream.handle)
        done += part
    return buffer


def tile_speed(gpu: Gpu, format: str, rows: int, k: int, columns: int) -> dict[str, Any]:
    """Many columns; operations per second, a product and a sum being two, and the share of peak."""
    rng = np.random.default_rng(1)
    planes, row_nbytes = _planes(rng, format, min(rows, PACKED_ROWS), k)
    x, meta = layouts.quantize(rng.standard_normal((columns, k), np.float32))
    total = rows * row_nbytes + x.nbytes + meta.nbytes + 4 * rows * columns
    with gpu.device.arena(total + (1 << 16), "tile") as arena:
        weights = [repeated(gpu, arena, plane, rows) for plane in planes]
        inputs = arena.upload(x, gpu.stream), arena.upload(meta, gpu.stream)
        values = *weights, *inputs, arena.take(4 * rows * columns), rows, columns, k // 32, rows
        grid = -(-rows // TILE), -(-columns // TILE)
        launch = gpu.device.launch(Kernel.of("tile", format=format), grid, *values)
        took = gpu.graph_seconds([launch] * (1 if gpu.small else 10), True)
        gpu.stream.synchronize()
    speed = 2 * rows * k * columns / took
    return {"seconds": took, "tflops": speed / 1e12, "share": speed / int8_peak(gpu)}


def int8_peak(gpu: Gpu) -> float:
    """Operations per second of all tensor cores at the highest clock."""
    info = gpu.device.info
    per_clock = NAN if gpu.small else INT8_OPS.get(info.capability, NAN)
    return per_clock * info.multiprocessors * info.clock_khz * 1e3
