"""How long a sum over virtual CPU devices takes: meetings, and bytes moved between caches.

    python scripts/bench_all_sum.py [THREADS OF EACH DEVICE, such as 1,1]

Every sum is of what each device has just written, as in a model. "each": every device adds up all
of it for itself; "once": each thread of all devices adds up its part, where all read it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed

from runtime import ops
from runtime.backends.cpu import CpuBackend
from runtime.backends.cpu.joint import Joint
from runtime.backends.cpu.rules import collective
from runtime.backends.cpu.run.cores import shared_out
from runtime.ops import Dim, Graph
from runtime.ops.collective import all_sum

MOST_ROUNDS, BYTES, REPEATS = 400, 8 << 20, 101  # a run is short, so that some are undisturbed


def rounds(n: int) -> int:
    """Sums of n floats in one run."""
    return min(MOST_ROUNDS, max(4, BYTES // (4 * n)))


def graph(n: int, device: int, devices: int, summed: bool) -> Graph:
    """x = the sum of all devices' x / devices, many times; or without the sums."""
    shape = (Dim("rows", max(1, n // 1024)), min(n, 1024))
    x = ops.step_input("x", shape, ops.DTYPES["f32"])
    for number in range(rounds(n)):
        x = ops.scale(x, factor=1 / devices)
        if summed:
            x = all_sum(
                x, shape=shape, holders=tuple(range(devices)), device=device, devices=devices,
                number=number,
            )  # fmt: skip
    return Graph((x,))


def microseconds(threads: list[int], n: int, once: bool, summed: bool) -> float:
    """Of one round, the least of many runs."""
    before, collective.ONCE_NBYTES = collective.ONCE_NBYTES, -1 if once else 1 << 40
    pairs = zip(threads, shared_out(len(threads)), strict=True)  # as devices of a model
    devices = [CpuBackend(threads=count, cores=cores) for count, cores in pairs]
    joint, count = Joint(devices), len(devices)
    program = joint.bind([
        device.plan(graph(n, number, count, summed)) for number, device in enumerate(devices)
    ])  # fmt: skip
    x = np.ones((max(1, n // 1024), min(n, 1024)), np.float32)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        (out,) = program.run({"x": x}, {"rows": len(x)})
        times.append(time.perf_counter() - start)
    assert not summed or (out == 1).all()
    collective.ONCE_NBYTES = before
    joint.close()
    for device in devices:
        device.close()
    return min(times) / rounds(n) * 1e6


def main() -> None:
    """Print a table."""
    threads = [int(n) for n in (sys.argv[1] if len(sys.argv) > 1 else "1,1").split(",")]
    print(f"devices of {threads} threads; microseconds of a sum")
    print(f"{'KiB':>6} {'each':>8} {'once':>8}")
    for kib in (1, 4, 16, 64, 256, 1024, 2048):
        n = kib * 256
        alone = microseconds(threads, n, False, False)
        each, once = (microseconds(threads, n, way, True) - alone for way in (False, True))
        print(f"{kib:6} {each:8.2f} {once:8.2f}")


if __name__ == "__main__":
    main()
