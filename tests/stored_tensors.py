"""Tensors as an open file has them, held in memory."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from runtime.ops.dtypes import F32, DType


class Stored:
    """Stands in for a GGUFTensor: `data` as its type stores `values`."""

    def __init__(
        self, values: np.ndarray, data: np.ndarray | None = None, dtype: DType = F32
    ) -> None:
        self._values, self.shape, self.dtype = values, values.shape, dtype
        self.data = (values if data is None else data).reshape(-1).view(np.uint8)
        self.nbytes = self.data.nbytes

    def read(self, start: int, out: np.ndarray) -> np.ndarray:
        out[:] = self.data[start : start + len(out)]
        return out

    def to_float32(self) -> np.ndarray:
        return self._values


def file_of(tensors: dict[str, Stored]) -> SimpleNamespace:
    """Stands in for a GGUFFile."""
    return SimpleNamespace(tensors=tensors)
