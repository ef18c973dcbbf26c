"""Kernels of the GPU to cubins, in parallel processes."""

from __future__ import annotations

import importlib.util
from collections.abc import Generator

from runtime.backends.base import Progress
from runtime.backends.plan import pool
from runtime.backends.plan.kernel import Kernel
from runtime.backends.plan.library import Head
from runtime.ops.errors import BackendError

from .catalogue import head


def compile_all(
    kernels: list[Kernel], target: str, progress: Progress | None = None
) -> Generator[tuple[Kernel, Head, bytes], None, None]:
    """Compile in parallel processes; heads and cubins of kernels as they finish.

    BackendError names the kernel that failed, or the extra to install.
    """
    require_toolchain()
    most = -(-len(kernels) // 4)  # starting a process takes as long as a few kernels
    with pool.Pool(__name__, target, "CUDA") as processes:
        yield from processes.compile(kernels, most, progress)


def require_toolchain() -> None:
    """BackendError saying what to install where kernels cannot be compiled."""
    if not all(importlib.util.find_spec(name) for name in ("numba_cuda", "cuda")):
        raise BackendError(
            "CUDA kernels are compiled by numba-cuda, which is not installed: "
            "pip install 'graph-runtime[cuda]' (Linux x86-64)"
        )


def serve(target: str) -> None:
    """The loop of a compile process for one target."""

    def answer(kernel: Kernel) -> tuple[Head, bytes]:
        from .compile import compile_kernel

        compiled = compile_kernel(kernel, target)
        return head(compiled), compiled.code

    pool.serve(answer)
