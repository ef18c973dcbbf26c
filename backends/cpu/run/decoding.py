"""How fast products with one token read weights of a type: what decoding reaches of bandwidth."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np

from runtime.backends.cpu import CpuBackend
from runtime.ops.dtypes import F32, DType
from runtime.ops.graph import Graph
from runtime.ops.matmul import matmul
from runtime.ops.tensor import Dim, step_input, weight

READ_BYTES = 1 << 28
_ROWS, _INNER = 2048, 2048
_ROUNDS, _REPEATS, _PAUSE = 3, 5, 0.1  # passes at once, and seconds between rounds of them


def decode_rate(dtype: DType, threads: int, n_bytes: int = READ_BYTES) -> float:
    """Bytes per second of stored weights of a type, the best of a few passes over `n_bytes`."""
    each = _ROWS * _INNER // dtype.block * dtype.nbytes
    x = step_input("x", (Dim("tokens", 1), _INNER), F32)
    weights = [weight(f"w{n}", (_ROWS, _INNER), dtype) for n in range(-(-n_bytes // each))]
    graph = Graph(tuple(matmul(x, w) for w in weights), "decode rate")
    tensors = {w.name: _Zeros(w.shape, dtype, each) for w in weights}
    backend = CpuBackend(SimpleNamespace(tensors=tensors), threads)
    try:
        program, spans = backend.program(graph), []
        inputs = {"x": np.ones((1, _INNER), np.float32)}
        for n in range(_ROUNDS * _REPEATS):
            if n and n % _REPEATS == 0:
                time.sleep(_PAUSE)  # what disturbs may be short
            start = time.perf_counter()
            program.run(inputs, {"tokens": 1})
            spans.append(time.perf_counter() - start)
    finally:
        backend.close()
    return each * len(weights) / min(spans)


class _Zeros:
    """A tensor of a file, as a device asks for it."""

    def __init__(self, shape: tuple[int, ...], dtype: DType, nbytes: int) -> None:
        self.shape, self.dtype, self.nbytes = shape, dtype, nbytes

    def read(self, start: int, out: np.ndarray) -> np.ndarray:
        out[:] = 0
        return out
