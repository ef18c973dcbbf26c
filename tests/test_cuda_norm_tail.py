"""Norms at the end of the launch that makes their row have the bits of the norm alone."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_models import fake_cuda
from stored_tensors import Stored, file_of
from tile_calls import random_rows

from runtime import ops
from runtime.backends.plan.plan import Plan
from runtime.ops.dtypes import DTYPES, F32
from runtime.ops.quants import dequantize


def _graph(tokens: int, n: int, inner: int) -> tuple[ops.Graph, dict[str, Stored]]:
    """x + a product, normed for an int8 and for a float product."""
    rng, stored = np.random.default_rng(1), {}
    for name, rows, columns, format in (
        ("w", n, inner, "Q8_0"), ("next", 40, n, "Q8_0"), ("router", 8, n, "F32"),
    ):  # fmt: skip
        kind = DTYPES[format.lower()]
        if kind is F32:
            data = value = rng.standard_normal((rows, columns)).astype(np.float32)
        else:
            data = random_rows(format, rows, columns)
            value = dequantize(data.reshape(-1), kind, (rows, columns))
        stored[name] = Stored(value, data, kind)
    norm = rng.random(n).astype(np.float32)
    stored["norm"] = Stored(norm, norm, F32)
    w, following, router, by = (ops.weight(k, stored[k].shape, stored[k].dtype) for k in stored)
    live = ops.Dim("tokens", tokens)
    y = ops.step_input("y", (live, inner), F32)
    x = ops.add(ops.step_input("x", (live, n), F32), ops.matmul(y, w), name="x+y")
    normed = ops.rms_norm(x, by, eps=1e-6, name="normed")
    return ops.Graph((x, ops.matmul(normed, following), ops.matmul(normed, router))), stored


def _run(tokens: int, n: int, inner: int, seed: int = 0) -> tuple[list[np.ndarray], Plan]:
    graph, stored = _graph(tokens, n, inner)
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((3, n + inner)).astype(np.float32)[:tokens]
    backend = fake_cuda(file_of(stored))
    program = backend.program(graph)
    inputs = {"x": rows[:, :n].copy(), "y": rows[:, n:].copy()}
    for _ in range(1 if tokens > 1 else 2):  # the tickets are as before
        found = [np.array(out) for out in program.run(inputs, {"tokens": tokens})]
    backend.close()
    return found, program.plan


@pytest.mark.parametrize(("n", "inner"), [(32, 32), (160, 64), (1056, 32)])
def test_bits_are_those_of_the_norm_alone(n: int, inner: int):
    """One token is normed at the end of the product, two are normed by launches of their own."""
    one, plan = _run(1, n, inner)
    two, other = _run(2, n, inner)
    launched = [call.kernel.name for call in plan.calls()]
    assert not [name for name in launched if "norm" in name]
    assert len([call for call in other.calls() if "norm" in call.kernel.name]) == 2
    for alone, among in zip(one, two, strict=True):
        np.testing.assert_array_equal(alone[0], among[0])
