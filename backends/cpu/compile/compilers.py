"""Kernels of the CPU to object code, in this process or in parallel ones."""

from __future__ import annotations

import os
from collections.abc import Generator

from runtime.backends.base import Progress
from runtime.backends.plan import pool
from runtime.backends.plan.kernel import Kernel


def compile_one(kernel: Kernel, isa: str) -> tuple[str, bytes]:
    """Symbol and object code of a kernel, compiled in this process."""
    from runtime.backends.cpu.compile.library import is_numba

    if not is_numba(kernel):
        return _compile_tile(kernel, isa)
    from runtime.backends.cpu.kernels.compile import compile_kernel

    code, symbol = compile_kernel(kernel.name, dict(kernel.constants), isa)
    return symbol, code


def _compile_tile(kernel: Kernel, isa: str) -> tuple[str, bytes]:
    from runtime.backends.cpu.compile import objects
    from runtime.backends.cpu.tile import TileSpec, emit_matmul, emit_pack

    constants = dict(kernel.constants)
    if kernel.name == "pack_weights":
        module = emit_pack(constants["format"], isa)
    else:
        module = emit_matmul(TileSpec(**constants, indirect=kernel.name == "matmul_id"), isa)
    return objects.ENTRY, objects.compile_ir(module, isa)


def compile_all(
    kernels: list[Kernel], isa: str, progress: Progress | None = None
) -> Generator[tuple[Kernel, str, bytes], None, None]:
    """Compile in parallel processes; yields (kernel, symbol, object code) as they finish.

    BackendError names the kernel that failed and the compiler's last line.
    """
    from runtime.backends.cpu.compile.library import is_numba

    environment = {**os.environ, "NUMBA_NUM_THREADS": "1"}
    environment.pop("RUNTIME_CPU_ISA", None)
    slow_first = sorted(kernels, key=lambda k: not is_numba(k))
    with pool.Pool(__name__, isa, "CPU", environment) as processes:
        for kernel, header, code in processes.compile(slow_first, len(kernels), progress):
            yield kernel, header["symbol"], code


def serve(isa: str) -> None:
    """The loop of a compile process for one instruction set."""

    def answer(kernel: Kernel) -> tuple[pool.Header, bytes]:
        symbol, code = compile_one(kernel, isa)
        return {"symbol": symbol}, code

    pool.serve(answer)
