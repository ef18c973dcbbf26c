"""What a step leaves, fetched to pinned memory as far as it is live."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from runtime.backends.cuda.arena import Buffer
from runtime.backends.cuda.held import Hands, Held
from runtime.backends.cuda.launcher import Device, Stream
from runtime.ops.errors import BackendError
from runtime.ops.tensor import Tensor


class Output:
    """One output of the graph, which begins where `source` does."""

    def __init__(self, device: Device, source: Buffer, tensor: Tensor) -> None:
        assert tensor.dtype.numpy is not None, f"{tensor!r} has no numpy type"
        self._source, self._dtype = source, tensor.dtype.numpy
        self._shape = tuple(int(n) for n in tensor.shape)
        self._strides = tuple(s * self._dtype.itemsize for s in tensor.layout.strides)
        self._driver = device.driver
        self._host = device.pinned((max(self._extent(self._shape), 1),), np.uint8)
        self._dim = str(getattr(tensor.shape[0] if tensor.shape else None, "name", ""))

    def fetch(self, stream: Stream, live: Mapping[str, int]) -> None:
        """Its live rows, in the stream's order."""
        nbytes = self._extent(self._live(live))
        if nbytes:
            address = self._host.array.ctypes.data
            self._driver.copy_to_host(address, self._source.address, nbytes, stream.handle)

    def array(self, live: Mapping[str, int]) -> np.ndarray:
        """Its live rows, once the stream was waited for; valid until the next fetch."""
        return np.ndarray(self._live(live), self._dtype, self._host.array, strides=self._strides)

    def held(self, live: Mapping[str, int], by: Hands) -> Held:
        """Its live rows where they are made; BackendError: they do not follow each other."""
        shape = self._live(live)
        if 0 not in shape and self._extent(shape) != math.prod(shape) * self._dtype.itemsize:
            raise BackendError(f"rows of {shape} that lie apart cannot be handed on")
        return Held(self._source, self._extent(shape), by)

    def close(self) -> None:
        """Give it back."""
        self._host.close()

    def _live(self, live: Mapping[str, int]) -> tuple[int, ...]:
        return (live[self._dim], *self._shape[1:]) if self._dim else self._shape

    def _extent(self, shape: tuple[int, ...]) -> int:
        """Bytes from the first element to the last."""
        if 0 in shape:
            return 0
        last = sum((n - 1) * s for n, s in zip(shape, self._strides, strict=True))
        return last + self._dtype.itemsize
