"""Models whose layers are on several devices, one behind the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import runtime
from runtime.backends.cpu import CpuBackend
from runtime.backends.meta.layers import LayersBackend
from runtime.model import Model


def load_layered(path: Path, shares: Sequence[float], **options: Any) -> Model:
    """A model on as many devices of one thread each."""

    def opened(_: str, file: Any, threads: None, activations: str, **split: None) -> LayersBackend:
        return LayersBackend([CpuBackend(file, 1, activations) for _ in shares], shares)

    with patch("runtime.model.open_backend", opened):
        return runtime.load(path, **options)
