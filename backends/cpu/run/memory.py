"""What programs of one model share and keep alive: weights and state.

Programs refer to this and not to the backend that keeps the programs, so forgetting a model frees
all of it at once, without a garbage collection.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

from runtime.backends.cpu.pages import from_plain, from_rows, to_plain, to_rows
from runtime.backends.cpu.run.cores import pinned
from runtime.backends.cpu.run.weights import WeightStore, aligned
from runtime.backends.plan.plan import Buffer
from runtime.ops.cost import page_nbytes
from runtime.ops.errors import BackendError
from runtime.ops.kv_formats import kv_format
from runtime.ops.tensor import Tensor


class FixedMemory:
    """Weights and states of one model on this device."""

    def __init__(self, weights: WeightStore) -> None:
        self.weights = weights
        self._states: dict[Hashable, np.ndarray] = {}

    def address(self, buffer: Buffer) -> int:
        """Where a weight or a state leaf lies, made on first use."""
        if buffer.memory == "state":
            assert buffer.tensor is not None, "a state buffer has its tensor"
            return self.state(buffer.tensor).ctypes.data
        return self.weights.address(buffer)

    def state(self, leaf: Tensor) -> np.ndarray:
        """uint8 [pages or slots, bytes of one] of a state leaf, zero-filled, on first use.

        The system gives memory to what is written, so room never used costs nothing, and the rest
        lies on the NUMA node of the threads that wrote it.
        """
        if leaf.content not in self._states:
            shape = (int(leaf.shape[0]), page_nbytes(leaf))
            try:
                self._states[leaf.content] = aligned(math.prod(shape), np.zeros).reshape(shape)
            except MemoryError:
                raise BackendError(
                    f"no memory for {leaf.name}: {math.prod(shape)} bytes; load the model with "
                    "a smaller `context` or fewer `sequences`"
                ) from None
        return self._states[leaf.content]

    def copy(self, leaf: Tensor, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy pages or slots of a leaf."""
        memory = self.state(leaf)
        with pinned(self.weights.cores):
            memory[list(targets)] = memory[list(sources)]

    def read(self, leaf: Tensor, rows: Sequence[int]) -> np.ndarray:
        """See `Backend.read_state`."""
        found = self.state(leaf)[list(rows)]
        if leaf.attrs["storage"] == "slots":
            return found.view(np.float32).reshape(len(rows), *map(int, leaf.shape[1:]))
        coded = kv_format(leaf.dtype.name).coding
        return to_rows(found, leaf) if coded else to_plain(found, leaf)

    def write(self, leaf: Tensor, rows: Sequence[int], values: np.ndarray) -> None:
        """The inverse of `read`."""
        as_kept = values.dtype == np.uint8
        values = np.ascontiguousarray(values, values.dtype if as_kept else np.float32)
        if leaf.attrs["storage"] == "slots":
            raw = values.reshape(len(rows), -1).view(np.uint8)
        else:
            raw = from_rows(values, leaf) if as_kept else from_plain(values, leaf)
        with pinned(self.weights.cores):
            self.state(leaf)[list(rows)] = raw
