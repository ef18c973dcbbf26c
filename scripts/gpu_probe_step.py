"""A made-up decode step of 300 launches: does a replayed graph give the bits of single launches?"""

from __future__ import annotations

from typing import Any

import numpy as np
from gpu_probe_arrays import random_blocks
from gpu_probe_cases import PACK
from gpu_probe_timing import Gpu

from runtime.backends.cuda.arena import Arena, Buffer
from runtime.backends.cuda.graphs import Graph, dependencies
from runtime.backends.cuda.kernels.matvec import rows_of
from runtime.backends.cuda.kernels.norm import warps_of
from runtime.backends.cuda.launcher import Launch
from runtime.backends.plan.kernel import Kernel

LAYER = 6  # launches


class Step:
    """Layers of norm, two products side by side, SwiGLU, a product, norm; one vector through all.

    The same weights in each layer; the last norm keeps the vector from growing.
    """

    def __init__(self, gpu: Gpu, arena: Arena, layers: int, n: int, inner: int) -> None:
        rng = np.random.default_rng(1)
        self.gpu, self.n, self.inner = gpu, n, inner
        self.first = rng.standard_normal((1, n), np.float32)
        self._norm = arena.upload(rng.random(n, np.float32), gpu.stream)
        self._gate, self._up = (self._weights(arena, rng, inner, n) for _ in range(2))
        self._down = self._weights(arena, rng, n, inner)
        self.x, self._y = arena.take(4 * n), arena.take(4 * n)
        self._packed = [arena.take(n), arena.take(n // 4)]
        self._wide = [arena.take(inner), arena.take(inner // 4)]
        self._g, self._u = arena.take(4 * inner), arena.take(4 * inner)
        self.launches = [launch for _ in range(layers) for launch in self._layer()]

    def _weights(self, arena: Arena, rng: np.random.Generator, rows: int, k: int) -> list[Buffer]:
        planes = PACK["Q4_0"](random_blocks(rng, "Q4_0", rows, k))
        return [arena.upload(plane, self.gpu.stream) for plane in planes]

    def _layer(self) -> list[Launch]:
        n, inner, launch = self.n, self.inner, self.gpu.device.launch
        into = Kernel.of("rms_norm_packed")
        out_of = Kernel.of("norm", wide=True, warps=warps_of(n))
        gated = Kernel.of("swiglu", packed=True)
        return [
            launch(into, 1, self.x, self._norm, *self._packed, n, n, n, 1e-6),
            self._product(self._gate, self._packed, self._g, inner, n),
            self._product(self._up, self._packed, self._u, inner, n),
            launch(gated, -(-inner // 1024), self._g, self._u, *self._wide, inner // 4),
            self._product(self._down, self._wide, self._y, n, inner),
            launch(out_of, 1, self._y, self._norm, self.x, n, 0, n, 0, n, n, 1e-6, 1),
        ]

    def _product(
        self, weights: list[Buffer], x: list[Buffer], out: Buffer, rows: int, k: int
    ) -> Launch:
        kernel = Kernel.of("matvec", format="Q4_0", columns=1)
        grid = -(-rows // rows_of("Q4_0", 1))
        return self.gpu.device.launch(kernel, grid, *weights, *x, out, rows, k // 32, rows)

    def result(self, run: Any) -> np.ndarray:
        """The vector after `run`, from its first value."""
        self.x.write(self.first, self.gpu.stream)
        run()
        return self.x.read(np.empty((1, self.n), np.float32), self.gpu.stream)


def replays(gpu: Gpu) -> dict[str, Any]:
    """How many replays of a graph of 300 nodes differ in bits from its launches one by one.

    With both kinds of edges; products of a layer side by side.
    """
    layers, count, n, inner = (2, 1, 32, 32) if gpu.small else (50, 1000, 1024, 2048)
    found: dict[str, Any] = {"nodes": LAYER * layers, "replays": count, "differing": {}}
    with gpu.device.arena(1 << 20 if gpu.small else 64 << 20, "step") as arena:
        step = Step(gpu, arena, layers, n, inner)
        eager = step.result(lambda: [launch.run(gpu.stream) for launch in step.launches])
        found["computed"] = bool(np.isfinite(eager).all() and (eager != step.first).any())
        for name, early in (("plain", False), ("programmatic", True)):
            edges = dependencies(step.launches, early)
            with Graph(gpu.device, step.launches, edges) as graph:
                results = (step.result(lambda g=graph: g.replay(gpu.stream)) for _ in range(count))
                found["differing"][name] = sum(
                    not np.array_equal(eager.view(np.uint32), r.view(np.uint32)) for r in results
                )
                took = gpu.seconds(lambda g=graph: g.replay(gpu.stream))
                found[f"{name}_us_per_node"] = 1e6 * took / len(step.launches)
                gpu.stream.synchronize()
    if any(found["differing"].values()) or not found["computed"]:
        found["error"] = f"differing {found['differing']}, computed {found['computed']}"
    return found
