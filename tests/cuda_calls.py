"""Calls of CUDA kernels on the simulator, and random weights in GGUF's block formats."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("greenlet", reason="the CUDA simulator needs greenlet")

from runtime.backends.cuda.catalogue import declared
from runtime.backends.cuda.simulator import launch
from runtime.backends.plan.kernel import Kernel
from runtime.ops.blocks import BLOCK_FORMATS
from runtime.ops.dtypes import DTYPES
from runtime.ops.quants import dequantize

NO_NORM = [np.zeros(1, np.float32)] * 5 + [0] * 5  # arguments of norm_tail.py


def simulate(name: str, grid: Any, *arguments: Any, constants: dict | None = None, **options: Any):
    """Run a kernel of the catalogue; threads and blocks take turns in random order."""
    kernel = declared(Kernel.of(name, **(constants or {})))
    launch(kernel, grid, *arguments, **{"order": "random", "seed": 1} | options)


def random_blocks(rng: np.random.Generator, format: str, rows: int, n: int) -> np.ndarray:
    """uint8 [rows, n, bytes]: every quant equally likely, scales near 1/100."""
    described = BLOCK_FORMATS[format.lower()]
    blocks = rng.integers(0, 256, (rows, n, described.nbytes), dtype=np.uint8)
    for field in described.fields.values():
        places = slice(field.offset, field.offset + field.nbytes)
        if field.kind == "f2":
            scales = rng.uniform(0.005, 0.02, (rows, n, 1)) * rng.choice([-1, 1], (rows, n, 1))
            blocks[..., places] = scales.astype(np.float16).view(np.uint8)
        elif field.kind == "half_e8m0":
            blocks[..., places] = rng.integers(118, 124, (rows, n, 1), dtype=np.uint8)
    return blocks


def values(blocks: np.ndarray, format: str) -> np.ndarray:
    """float64 [rows, k] of GGUF blocks."""
    rows, n, _ = blocks.shape
    dtype = DTYPES[format.lower()]
    return dequantize(blocks, dtype, (rows, n * dtype.block)).astype(np.float64)


def unset(*shape: int) -> np.ndarray:
    """Outputs: NaN where a kernel writes nothing."""
    return np.full(shape, np.nan, np.float32)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Root of the mean squared error over that of the expected values."""
    difference = found.astype(np.float64) - expected
    return float(np.sqrt((difference**2).mean() / max((expected**2).mean(), 1e-300)))
