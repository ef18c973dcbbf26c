"""A few ops on the CUDA backend, quickly: the grid is in test_cuda_ops.py."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_models import fake_cuda
from op_grid import Built

from runtime.ops.registry import OPS


@pytest.mark.parametrize("name", ["matmul", "select_rows"])
def test_an_op_runs(name: str):
    built = Built(name, OPS[name].cases[0])
    backend = fake_cuda(built.file(), activations="f32")
    (found, *_) = backend.program(built.graph).run(built.inputs, built.live)
    assert found.shape == tuple(map(int, built.node.shape)) and np.isfinite(found).all()
    backend.close()
