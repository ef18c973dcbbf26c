"""What rounding a tensor to a type costs: the squared error of its products, by its inputs."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np

from runtime.backends.cpu.quantising import Quantiser
from runtime.gguf.reader import GGUFTensor
from runtime.ops.dtypes import DType, nbytes_for
from runtime.ops.quants import dequantize

_SAMPLE = 1 << 20  # numbers of a tensor that are tried


def sample(tensor: GGUFTensor, most: int = _SAMPLE) -> Iterator[tuple[int, np.ndarray]]:
    """(matrix, float32 [rows, columns]): rows of a tensor, evenly from all of it, whole ones."""
    columns, rows = tensor.shape[-1], prod(tensor.shape[:-1])
    of_matrix, nbytes = tensor.shape[-2], nbytes_for(tensor.dtype, (columns,))
    matrices = rows // of_matrix
    wanted = min(rows, max(matrices, most // columns))
    places = np.arange(wanted) * rows // wanted
    for matrix in np.unique(places // of_matrix):
        chosen = places[places // of_matrix == matrix]
        found = np.empty((len(chosen), nbytes), np.uint8)
        for row, place in zip(found, chosen, strict=True):
            tensor.read(int(place) * nbytes, row)
        yield int(matrix), dequantize(found, tensor.dtype, (len(chosen), columns))


def errors(
    tensor: GGUFTensor, kinds: list[DType], importance: np.ndarray | None, quantiser: Quantiser
) -> list[float]:
    """Of each type the mean over rows of the squared error of their products, about.

    importance: float32 [matrices, columns], the mean squares of what columns are multiplied with,
    by which errors weigh; None for all alike.
    """
    total, count = np.zeros(len(kinds)), 0
    for matrix, rows in sample(tensor):
        weights = None if importance is None else np.ascontiguousarray(importance[matrix])
        for n, kind in enumerate(kinds):
            rounded = dequantize(quantiser(rows, kind, weights), kind, rows.shape)
            squares = (rows - rounded) ** 2
            total[n] += (squares if weights is None else squares @ weights).sum(dtype=np.float64)
        count += len(rows)
    return [float(x) for x in total / count]
