"""A GPU that is not there, with a stream and an arena, and norms to launch on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fake_driver import FakeDriver
from fake_nodes import FakeLibrary

from runtime.backends.cuda.arena import Buffer
from runtime.backends.cuda.launcher import Device, Launch
from runtime.backends.plan.kernel import Kernel

NORM, ROWS, N = Kernel.of("norm", wide=True, warps=1), 2, 64
NUMBERS = (N, 0, N, 0, N, N, 1e-6, 1)  # arguments behind the pointers
NBYTES = 4 * ROWS * N


class Gpu:
    """`execute`: kernels run on the simulator, which needs greenlet."""

    def __init__(self, execute: bool = False, **options: Any) -> None:
        if execute:
            pytest.importorskip("greenlet", reason="the CUDA simulator needs greenlet")
        self.driver = FakeDriver(execute=execute, **options)
        self.device = Device(self.driver, 0, FakeLibrary())
        self.stream = self.device.stream()
        self.arena = self.device.arena(1 << 20, "work")
        self.weight = self.upload(np.ones(N, np.float32))

    def upload(self, array: np.ndarray) -> Buffer:
        """A buffer that all streams may use."""
        buffer = self.arena.upload(array, self.stream)
        self.stream.synchronize()
        return buffer

    def norm(self, x: Buffer, out: Buffer) -> Launch:
        """out = x / its root mean square, rows of 64."""
        return self.device.launch(NORM, ROWS, x, self.weight, out, *NUMBERS)

    def buffers(self, count: int) -> list[Buffer]:
        """Each as large as the norm's rows."""
        return [self.arena.take(NBYTES) for _ in range(count)]

    def values(self, buffer: Buffer) -> np.ndarray:
        """float32 [2, 64] of a buffer."""
        return buffer.read(np.empty((ROWS, N), np.float32), self.stream)


def normed(x: np.ndarray) -> np.ndarray:
    """What `Gpu.norm` computes."""
    return x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-6)
