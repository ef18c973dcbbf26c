"""What lies in a program's memory, as numpy arrays: for VALIDATE, and for tests."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from runtime.backends.plan.plan import Buffer, Plan
from runtime.ops.kv_formats import kv_format
from runtime.ops.tensor import Dim, Tensor


class Packed(Protocol):
    """Packed activations, taken apart."""

    @property
    def values(self) -> np.ndarray:
        """float64 [rows, n]: what they stand for."""
        ...

    @property
    def codes(self) -> np.ndarray | None:
        """int8 [rows, n / 32, 32], rows filled up; None of floats."""
        ...

    def wrong(self, want: np.ndarray, slack: float) -> np.ndarray:
        """bool [rows, n / 32]: blocks of codes that no exact packing of `want` [rows, n] gives.

        slack: how far, in shares of a block's largest, its values may be from `want`.
        """
        ...


class Contents:
    """Results and state of one step in a program's memory; live rows alone.

    A device says how its bytes are read, packed activations taken apart and tiles listed.
    of_attention: the largest normalised squared error of what attention adds up there.
    """

    of_attention = 1e-10

    def __init__(self, plan: Plan, live: Mapping[str, int]) -> None:
        self._plan, self._live = plan, live

    def shape(self, x: Tensor) -> tuple[int, ...]:
        """The live part of a tensor's shape."""
        return tuple(self._live[n.name] if isinstance(n, Dim) else int(n) for n in x.shape)

    def array(self, x: Tensor) -> np.ndarray:
        """What a result, or a view of one, stands for: float32, int32, or of a pack float64."""
        if x.dtype.is_blocked:
            values = self.packed(x).values
            return values if self.gathered(x) else self._rows(x, values).reshape(self.shape(x))
        if "experts" in x.attrs:
            return self.tiles(x)
        assert x.dtype.numpy is not None, f"{x!r} has no numpy type"
        return self.part(x, self.bytes_of(x.base).view(x.dtype.numpy))

    def part(self, x: Tensor, base: np.ndarray) -> np.ndarray:
        """The live part of x, whose memory lies in `base` (all elements, flat)."""
        layout, item = x.layout, base.itemsize
        strides = tuple(item * stride for stride in layout.strides)
        start = base[layout.offset :]
        whole = np.ndarray([int(n) for n in x.shape], base.dtype, start, strides=strides)
        return whole[tuple(slice(n) for n in self.shape(x))]

    def digest(self, buffer: Buffer) -> int:
        """A checksum of a buffer of the arena."""
        return zlib.crc32(self.bytes(buffer).tobytes())

    def totals(self, leaf: Tensor) -> np.ndarray:
        """uint64 by page or slot: the sum of its words; 0 where nothing was ever written."""
        memory = self.pages(leaf)
        words = memory.view(np.uint64 if memory.shape[1] % 8 == 0 else np.uint32)
        return words.sum(1, dtype=np.uint64)

    def state(self, leaf: Tensor, rows: np.ndarray) -> np.ndarray:
        """float32 [len(rows), ...]: these pages (as [PAGE, heads, dim]) or slots of a leaf."""
        if not len(rows):
            return np.zeros((0, *map(int, leaf.shape[1:])), np.float32)
        found = self.read(leaf, rows)
        if found.dtype == np.uint8:
            return kv_format(leaf.dtype.name).plain(found, int(leaf.shape[3]))
        return found

    def holds(self, x: Tensor) -> bool:
        """Whether a result is in memory: not if the kernel that makes it does another op too."""
        buffer = self._plan.results[x]
        return buffer.memory != "arena" or buffer.offset >= 0

    def bytes_of(self, x: Tensor) -> np.ndarray:
        """uint8: the memory of a result."""
        return self.bytes(self._plan.results[x])

    def gathered(self, x: Tensor) -> bool:
        """Whether a pack's rows are those of experts' tiles."""
        return "experts" in x.inputs[-1].attrs

    def _rows(self, x: Tensor, values: np.ndarray) -> np.ndarray:
        return values[: math.prod(self.shape(x)[:-1])]

    def bytes(self, buffer: Buffer) -> np.ndarray:
        """uint8: a buffer of the arena."""
        raise NotImplementedError

    def pages(self, leaf: Tensor) -> np.ndarray:
        """uint8 [pages or slots, bytes]: all of a state leaf."""
        raise NotImplementedError

    def read(self, leaf: Tensor, rows: np.ndarray) -> np.ndarray:
        """As `Backend.read_state`."""
        raise NotImplementedError

    def packed(self, x: Tensor) -> Packed:
        """A pack node's rows, perhaps with some behind that are none."""
        raise NotImplementedError

    def tiles(self, x: Tensor) -> np.ndarray:
        """int32 [live tiles, 1 + C]: an expert, and the row of each column or -1."""
        raise NotImplementedError
