"""What lies in the memory of a program of the CPU's: see plan/contents.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from runtime.backends.cpu.rules.moe import HEADER
from runtime.backends.cpu.run.memory import FixedMemory
from runtime.backends.cpu.tile.spec import PIECES, STRETCHES, activation_tile_nbytes
from runtime.backends.plan import contents
from runtime.backends.plan.plan import Buffer, Plan
from runtime.ops.tensor import Tensor

_CLOSE = 1e-5  # how near a scale must be to the best one: float32 sums of 32 products


@dataclass(frozen=True)
class Packed:
    """Activations packed into tiles of C columns, taken apart; layouts: kernels/pack.py.

    values: float64 [tiles * C, n], what they stand for. Of int8 also codes [tiles * C, n / 32, 32],
    scales float32 [tiles * C, n / 32], and the sums that lie behind them.
    """

    values: np.ndarray
    codes: np.ndarray | None = None
    scales: np.ndarray | None = None
    sums: np.ndarray | None = None

    @staticmethod
    def of(raw: np.ndarray, n: int, columns: int, coding: str) -> Packed:
        """From uint8 [tiles, bytes of a tile] of rows of n values."""
        if coding == "f32":
            tiles = raw[:, : 4 * n * columns].view(np.float32).reshape(-1, n, columns)
            return Packed(tiles.swapaxes(1, 2).reshape(-1, n).astype(np.float64))
        blocks = n // 32
        if coding == "split":
            pieces = raw[:, : 2 * PIECES * n * columns].view(np.uint16).astype(np.uint32) << 16
            shape = (-1, blocks, PIECES, columns, 32)
            whole = pieces.view(np.float32).reshape(shape).astype(np.float64).sum(2)
            return Packed(whole.swapaxes(1, 2).reshape(-1, n))
        end = n * columns
        codes = raw[:, :end].view(np.int8).reshape(-1, blocks, columns, 32)
        codes = codes.swapaxes(1, 2).reshape(-1, blocks, 32)  # type: ignore[assignment]
        side = np.ascontiguousarray(raw[:, end : end + blocks * columns * 20])
        side = side.view(np.int32).reshape(-1, blocks, 5, columns).transpose(0, 3, 1, 2)
        side = np.ascontiguousarray(side).reshape(-1, blocks, 5)
        scales = side[..., 0].view(np.float32)
        values = (codes.astype(np.float64) * scales[..., None]).reshape(-1, n)
        return Packed(values, codes, scales, side[..., 1:])

    def wrong(self, want: np.ndarray, slack: float) -> np.ndarray:
        """bool [rows, n / 32]: int8 blocks that no exact packing of `want` [rows, n] gives.

        slack: how far, in shares of a block's largest, its values may be from `want`. Codes are
        the nearest to want / scale for the best of the scales that are tried, and the scale kept
        is the one that fits them best; only where rounding is a tie within the slack may a code
        be either neighbour.
        """
        assert self.codes is not None and self.scales is not None and self.sums is not None
        x, q = want.reshape(self.codes.shape), self.codes.astype(np.float64)
        peak = np.abs(x).max(-1, keepdims=True)
        empty = peak[..., 0] < 1e-30
        found = np.zeros(empty.shape, bool)
        steps = [np.where(peak > 0, peak, 1) / 127 * stretch for stretch in STRETCHES]
        errors = [((np.rint(x / step) * step - x) ** 2).sum(-1) for step in steps]
        least = np.min(errors, axis=0)
        for step, error in zip(steps, errors, strict=True):
            near = (np.abs(q - x / step) <= 0.5 + 127 * slack + _CLOSE).all(-1)
            found |= near & (error <= least * (1 + 1e-3) + (127 * slack * step[..., 0]) ** 2)
        best = (x * q).sum(-1) / np.maximum(1, (q * q).sum(-1))
        found &= np.abs(self.scales - best) <= (_CLOSE + slack) * np.abs(best)
        found = np.where(empty, (self.scales == 0) & (q == 0).all(-1), found)
        halves = self.codes.reshape(*empty.shape, 2, 16).sum(-1, dtype=np.int32)
        total = halves.sum(-1)
        found &= (self.sums[..., 1] == -8 * total) & (self.sums[..., 2:] == -8 * halves).all(-1)
        product = self.scales * total.astype(np.float32)
        found &= np.ascontiguousarray(self.sums[..., 0]).view(np.float32) == product
        return ~found & np.isfinite(peak[..., 0])


class Contents(contents.Contents):
    """See plan/contents.py."""

    def __init__(
        self, plan: Plan, arena: np.ndarray, memory: FixedMemory, live: Mapping[str, int]
    ) -> None:
        super().__init__(plan, live)
        self._arena, self._memory = arena, memory

    def bytes(self, buffer: Buffer) -> np.ndarray:
        """See plan/contents.py."""
        return self._arena[buffer.offset : buffer.offset + buffer.nbytes]

    def pages(self, leaf: Tensor) -> np.ndarray:
        """See plan/contents.py."""
        return self._memory.state(leaf)

    def read(self, leaf: Tensor, rows: np.ndarray) -> np.ndarray:
        """See plan/contents.py."""
        return self._memory.read(leaf, rows.tolist())

    def packed(self, x: Tensor) -> Packed:
        """See plan/contents.py: tiles, columns without a row among them."""
        n, columns, coding = int(x.shape[-1]), x.attrs["C"], x.attrs["coding"]
        rows = math.prod(self.shape(x)[:-1])
        tiles = len(self.tiles(x.inputs[-1])) if self.gathered(x) else -(-rows // columns)
        nbytes = activation_tile_nbytes(columns, coding, n)
        raw = self.bytes_of(x)[: tiles * nbytes].reshape(-1, nbytes)
        return Packed.of(raw, n, columns, coding)

    def tiles(self, x: Tensor) -> np.ndarray:
        """See plan/contents.py."""
        raw, width = self.bytes_of(x), 1 + x.attrs["C"]
        count = int(raw[:8].view(np.int64)[0])
        return raw[HEADER:].view(np.int32)[: count * width].reshape(-1, width)
