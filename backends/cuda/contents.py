"""What lies in the memory of a program of a GPU, copied out: see plan/contents.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from runtime.backends.cuda.layouts import BLOCK, PIECE, column_nbytes, cut
from runtime.backends.cuda.rules.experts import groups
from runtime.backends.cuda.stores import Store
from runtime.backends.cuda.widths import FEW
from runtime.backends.passes.packing import expert_tiles
from runtime.backends.plan import contents
from runtime.backends.plan.plan import Buffer, Plan
from runtime.ops.tensor import Tensor

_CLOSE = 1e-5  # how near a scale and a tie must be: float32 divisions


@dataclass(frozen=True)
class Packed:
    """Packed rows, taken apart; layout: layouts.py. Of int8 the blocks of 32 in order.

    values: float64 [rows, n]. codes: int8 [rows, blocks, 32]. scales: float32 [rows, blocks]. sums:
    int16 [rows, blocks, 2], negated, of the halves.
    """

    values: np.ndarray
    codes: np.ndarray | None = None
    scales: np.ndarray | None = None
    sums: np.ndarray | None = None

    @staticmethod
    def of(raw: np.ndarray, n: int, coding: str) -> Packed:
        """From uint8 [rows, bytes of a row] of n values."""
        if coding == "f32":
            return Packed(raw.view(np.float32)[:, :n].astype(np.float64))
        rows, cuts = len(raw), cut(n)
        end = cuts.places * BLOCK
        halves = raw[:, :end].reshape(rows, 2, -1, PIECE).swapaxes(1, 2).view(np.int8)
        meta = np.ascontiguousarray(raw[:, end:]).reshape(rows, -1, 8)
        order = np.argsort(cuts.order())  # the place of each block
        codes = halves.reshape(rows, -1, BLOCK)[:, order]
        scales = meta.view(np.float32)[:, order, 0]
        values = (codes.astype(np.float64) * scales[..., None]).reshape(rows, -1)[:, :n]
        return Packed(values, codes, scales, meta.view(np.int16)[:, order, 2:])

    def wrong(self, want: np.ndarray, slack: float) -> np.ndarray:
        """See plan/contents.py: the scale is a 127th of the largest, codes are the nearest."""
        assert self.codes is not None and self.scales is not None and self.sums is not None
        x = np.zeros((len(want), self.codes.shape[1] * BLOCK))
        x[:, : want.shape[1]] = want
        x = x.reshape(self.codes.shape)
        peak = np.abs(x).max(-1)
        step = np.where(peak > 0, peak, 1)[..., None] / 127
        fits = (np.abs(self.codes - x / step) <= 0.5 + 127 * slack + _CLOSE).all(-1)
        fits &= np.abs(self.scales - peak / 127) <= (slack + _CLOSE) * peak / 127
        halves = self.codes.reshape(*peak.shape, 2, PIECE).sum(-1, dtype=np.int16)
        return ~(fits & (self.sums == -halves).all(-1)) & np.isfinite(peak) & (peak > 1e-30)


class Contents(contents.Contents):
    """See plan/contents.py. copied: the bytes of a buffer of the arena, once all is done.

    Attention multiplies float32 as pairs of half as many bits, which leaves 16 of 24.
    """

    of_attention = 1e-8

    def __init__(
        self, plan: Plan, copied: Callable[[Buffer], np.ndarray], store: Store,
        live: Mapping[str, int],
    ) -> None:  # fmt: skip
        super().__init__(plan, live)
        self._copied, self._store = copied, store

    def bytes(self, buffer: Buffer) -> np.ndarray:
        """See plan/contents.py."""
        return self._copied(buffer)

    def pages(self, leaf: Tensor) -> np.ndarray:
        """See plan/contents.py."""
        return self._store.raw(leaf, range(int(leaf.shape[0])))

    def read(self, leaf: Tensor, rows: np.ndarray) -> np.ndarray:
        """See plan/contents.py."""
        return self._store.read(leaf, rows.tolist())

    def packed(self, x: Tensor) -> Packed:
        """See plan/contents.py."""
        n, coding = int(x.shape[-1]), x.attrs["coding"]
        rows, nbytes = math.prod(self.shape(x)[:-1]), column_nbytes(n, coding)
        return Packed.of(self.bytes_of(x)[: rows * nbytes].reshape(-1, nbytes), n, coding)

    def tiles(self, x: Tensor) -> np.ndarray:
        """See plan/contents.py: of single choices, those of this device, by expert or in order."""
        given = x.inputs[0]
        choices, grouped = math.prod(self.shape(given)), expert_tiles.made(x)
        words = self.bytes_of(x).view(np.int32)
        if grouped and int(given.shape[0]) > FEW:
            _, capacity, first = groups(x)
            found = words[first // 4 :][: 4 * capacity].reshape(-1, 4)
            listed = [(e, words[at + i]) for e, at, count, _ in found for i in range(count)]
            return np.array(listed, np.int32).reshape(-1, 2)
        ids = words[:choices]
        rows = np.flatnonzero(ids >= 0)
        if grouped:
            rows = rows[np.argsort(ids[rows], kind="stable")]
        return np.stack([ids[rows], rows], 1).astype(np.int32)
