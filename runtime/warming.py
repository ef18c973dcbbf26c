"""Which kernels of a GPU a model can need, found and compiled where there is no such GPU."""

from __future__ import annotations

import re
from typing import Any

from runtime.backends.base import Progress
from runtime.backends.plan.kernel import Kernel

_TARGET = re.compile(r"\s*cuda:(sm_\w+)\s*", re.IGNORECASE)


def targets_of(devices: str) -> list[str]:
    """["sm_80", "sm_90a"] of "cuda:sm_80,cuda:sm_90a"; none of devices that are there to run on.

    BackendError: there is no such target.
    """
    from runtime.backends.cuda.targets import capability

    found = [match[1].lower() for part in devices.split(",") if (match := _TARGET.fullmatch(part))]
    if len(found) != devices.count(",") + 1:
        return []
    for target in found:
        capability(target)
    return found


def every_kernel() -> list[Kernel]:
    """All that any model needs."""
    from runtime.backends.cuda.catalogue import KERNELS

    return KERNELS.every()


def kernels_of(
    file: Any, kv_types: tuple[str, str], activations: str = "int8", cache_rotation: bool = True
) -> list[Kernel]:
    """Those of an open GGUF file's model, in steps of all sizes. BackendError: it cannot run."""
    from runtime.backends.cuda.planner import Planner, options
    from runtime.backends.cuda.uploads import REPACK
    from runtime.backends.null import NullBackend
    from runtime.engine.graphs import StepGraphs
    from runtime.memory.budget import LEAST_SLOTS, CacheSize
    from runtime.models.registry import build

    architecture = build(file)
    size = CacheSize(architecture.p.context, 1, LEAST_SLOTS)
    backend = NullBackend(Planner(options(activations)))
    graphs = StepGraphs(architecture, kv_types, size, cache_rotation).warm(backend)
    used = (k for graph in graphs for k in backend.plan(graph).kernels())
    return list(dict.fromkeys([REPACK, *used]))


def fill(target: str, kernels: list[Kernel], progress: Progress | None = None) -> int:
    """Have them in the cache for a target; how many were compiled.

    BackendError: the toolchain is not installed, or a kernel does not compile.
    """
    from runtime.backends.cuda.library import library

    absent = library(target).missing(kernels)
    library(target).prepare(kernels, progress)
    return len(absent)
