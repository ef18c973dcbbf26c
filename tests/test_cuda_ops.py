"""Every op on the CUDA backend, its kernels on the simulator: the cases of test_ops.py.

All of them in numpy_grid.py, one form of each op in the simulator, which finds races as well and
takes far longer (CUDA_OPS=all: all of them there too).
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from cuda_models import fake_cuda
from op_grid import INPUTS, Built, grid
from test_ops import RUN, _check, _fill, _left, _wanted

from runtime.backends.cuda.rules import RULES
from runtime.ops.dtypes import BF16
from runtime.ops.errors import BackendError
from runtime.ops.quants import dequantize
from runtime.ops.registry import OPS

pytest.importorskip("greenlet", reason="the CUDA simulator needs greenlet")

HAVE = set(RULES.names()) | {name for name, op in OPS.items() if op.view}
HAVE |= {op for op, fused in (("matmul", "linear"), ("matmul_id", "linear_id")) if fused in HAVE}
SOME = ("whole", "partly", "empty")  # variants of a plain run; CUDA_OPS=all takes all of them
ALL = os.environ.get("CUDA_OPS") == "all"
POINTS = [
    p
    for p in RUN
    if p.values[0] in HAVE and (ALL or p.values[2] in SOME) and p.values[2] not in INPUTS
]


@pytest.mark.parametrize("name, n, variant", POINTS)
def test_cuda_backend(name: str, n: int, variant: str):
    """Against the oracle, the kernels in random order, the graph in any order its edges allow."""
    built = Built(name, OPS[name].cases[n], variant)
    results, left = _wanted(built)
    quick = not ALL and (n > 0 or variant != "partly")
    backend = fake_cuda(built.file(), quick=quick, activations="f32")
    try:
        program = backend.program(built.graph)
    except BackendError as reason:
        if "cannot run" in str(reason):
            pytest.xfail(str(reason))
        raise
    _fill(backend, built)
    got = program.run(built.inputs, built.live)
    for found, want in zip(got, results, strict=True):
        if built.node.dtype is BF16:
            found = dequantize(found, BF16, found.shape)
        _check(np.asarray(found), want, max(built.case.tolerance, 1e-10))
    for key, value in left.items():
        _check(_left(backend, built, key), value, max(built.case.tolerance, 1e-6))
    backend.close()


def test_the_grid_reaches_the_cuda_rules():
    assert {name for name, *_ in grid()} & HAVE
