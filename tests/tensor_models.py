"""Models loaded on several virtual devices that compute every tensor together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import runtime
from runtime import model as model_module
from runtime.backends.cpu import CpuBackend
from runtime.backends.meta.parts import Split, inferred
from runtime.backends.meta.tensor import TensorBackend
from runtime.model import Model


def summed() -> Any:
    """Meanwhile CPU devices of one process split tensors as those of several do, with sums."""
    split = partial(TensorBackend, split=inferred)
    return patch("runtime.backends.meta.tensor.TensorBackend", split)


def load_split(
    path: Path | None, shares: Sequence[float], threads: Sequence[int] = (),
    divide: Split = inferred, **given: Any,
) -> Model:  # fmt: skip
    """`runtime.load` on len(shares) devices, of one thread each unless said otherwise."""

    def opened(
        devices: str, file: Any, n_threads: int | None, activations: str, **split: Any
    ) -> TensorBackend:
        counts = threads or [1] * len(shares)
        return TensorBackend([CpuBackend(file, n, activations) for n in counts], shares, divide)

    with patch.object(model_module, "open_backend", opened):
        return runtime.load(path, **given)
