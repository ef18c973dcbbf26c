"""How fast this machine reads memory: the yardstick for decoding, which reads every weight once."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np

from runtime.backends.cpu.compile.isa import isa, selected
from runtime.backends.cpu.run.cores import physical_cores
from runtime.ops.errors import BackendError

READ_BYTES = 1 << 30
_STREAMS, _REPEATS = 8, 5
_STEP = 128  # bytes of one stream per turn of the loop


def read_bandwidth(threads: int | None = None, n_bytes: int = READ_BYTES) -> float:
    """Bytes per second that `threads` threads read together, the best of 5 passes.

    Every thread reads its own contiguous part of `n_bytes` (1 GiB) as 8 streams side by side.
    threads: None for the number of physical cores. The memory is given back at the end.
    Raises BackendError when the memory cannot be had.
    """
    from runtime.backends.cpu.compile import objects

    n_threads = threads or physical_cores()
    try:
        memory = np.ones(n_bytes // 8, np.uint64)  # writing brings every page in
    except MemoryError:
        raise BackendError(f"read_bandwidth: no {n_bytes} bytes of free memory") from None
    name = selected()
    kernel = objects.function(objects.load_object(objects.compile_ir(_emit(name), name)))
    sums = np.zeros((n_threads, 8), np.uint64)
    args = np.array([memory.ctypes.data, n_bytes, sums.ctypes.data], np.int64)
    best = min(timed(kernel, args.ctypes.data, n_threads) for _ in range(_REPEATS))
    read = n_bytes // (n_threads * _STREAMS * _STEP) * (n_threads * _STREAMS * _STEP)
    return read / best


def timed(kernel: Any, args: int, n_threads: int) -> float:
    """Seconds from the first thread's start to the last one's end."""
    ready = threading.Barrier(n_threads)
    spans: list[tuple[float, float]] = []

    def work(thread: int) -> None:
        ready.wait()
        start = time.perf_counter()
        kernel(args, thread, n_threads)
        spans.append((start, time.perf_counter()))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(n_threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return max(end for _, end in spans) - min(start for start, _ in spans)


def _emit(isa_name: str) -> str:
    """A kernel (address, bytes, sums): adds up its part, so that no load can be left out."""
    from runtime.backends.cpu.tile.vector import I32, Code, const, vec

    code = Code(isa(isa_name))
    args = code.arguments(("memory", "n_bytes", "sums"))
    share = code.b.udiv(args["n_bytes"], code.times(code.n_threads, _STREAMS * _STEP))
    stream = code.times(share, _STEP)
    base = code.at(args["memory"], code.times(code.times(stream, _STREAMS), code.thread))
    starts = [code.at(base, code.times(stream, s)) for s in range(_STREAMS)]
    kind = vec(I32, code.lanes)

    def step(i: Any, sums: list[Any]) -> list[Any]:
        result = []
        for start, total in zip(starts, sums, strict=True):
            for offset in range(0, _STEP, 4 * code.lanes):
                total = code.b.add(total, code.load(code.at(start, i, offset), kind))
            result.append(total)
        return result

    zeros = [code.fill(I32, 0) for _ in starts]
    sums = code.loop(const(0), stream, zeros, step, step=_STEP)
    total = sums[0]
    for other in sums[1:]:
        total = code.b.xor(total, other)
    code.store(total, code.at(args["sums"], code.times(code.thread, 64)))
    return code.finish()
