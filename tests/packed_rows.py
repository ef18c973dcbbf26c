"""Packed activations of the pack kernels: made on fenced memory, and taken apart."""

from __future__ import annotations

from typing import Any

import numpy as np
from kernel_calls import ISAS, Fenced, run

from runtime.backends.cpu.tile.spec import activation_tile_nbytes
from runtime.backends.plan.kernel import Kernel


class Packed:
    """Packed activations, taken apart."""

    def __init__(self, rows: int, n: int, C: int, coding: str) -> None:
        self.rows, self.n, self.C, self.coding = rows, n, C, coding
        self.tiles = -(-rows // C)
        self.tile_nbytes = activation_tile_nbytes(C, coding, n)
        self.memory = Fenced(1, self.tiles * self.tile_nbytes // 4, dtype=np.int32)

    def check(self) -> None:
        assert self.memory.strays(1) == 0

    def columns(self) -> np.ndarray:
        """float32 [tiles * C, n] of float32."""
        tiles = self.memory.values.view(np.float32).reshape(self.tiles, -1)[:, : self.n * self.C]
        return tiles.reshape(self.tiles, self.n, self.C).swapaxes(1, 2).reshape(-1, self.n)

    def blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """Quants int8 [tiles * C, n / 32, 32] and side data int32 [tiles * C, n / 32, 5]."""
        raw = self.memory.values.view(np.uint8).reshape(self.tiles, self.tile_nbytes)
        blocks, end = self.n // 32, self.n * self.C
        quants = raw[:, :end].view(np.int8).reshape(self.tiles, blocks, self.C, 32)
        side = np.ascontiguousarray(raw[:, end : end + blocks * self.C * 20]).view(np.int32)
        side = side.reshape(self.tiles, blocks, 5, self.C)
        return (
            quants.swapaxes(1, 2).reshape(-1, blocks, 32),
            side.transpose(0, 3, 1, 2).reshape(-1, blocks, 5),
        )

    def bits(self) -> list[bytes]:
        """What each column holds, whatever tile it lies in."""
        if self.coding == "f32":
            return [row.tobytes() for row in self.columns()]
        quants, side = self.blocks()
        return [q.tobytes() + s.tobytes() for q, s in zip(quants, side, strict=True)]


def pack(
    name: str,
    C: int,
    coding: str,
    *x: np.ndarray,
    threads: int = 1,
    isa: str = ISAS[0],
    **more: Any,
) -> Packed:
    rows, n = x[0].shape
    packed = Packed(rows, n, C, coding)
    sources = [Fenced.of(v, n + 7) for v in x]
    names = ("gate", "up") if name == "swiglu_pack" else ("x",)
    places = dict(zip(names, sources, strict=True)) | {f"{k}_stride": n + 7 for k in names}
    constants = {"C": C, "coding": coding}
    if name == "swiglu_pack":
        constants["act"] = "oai" if "alpha" in more else "silu"
        more = {"alpha": 0.0, "limit": 0.0, **more}
    run(
        Kernel.of(name, **constants), isa, threads, out=packed.memory, live=rows, n=n,
        **places, **more,
    )  # fmt: skip
    packed.check()
    return packed
