"""Kernels of the CPU to object code, in this process or in parallel ones."""

from __future__ import annotations

import os
from collections.abc import Generator

from runtime.backends.base import Progress
from runtime.backends.cpu.tile.spec import TILE_KERNELS
from runtime.backends.plan import pool
from runtime.backends.plan.kernel import Kernel
from runtime.backends.plan.library import Head


def compile_one(kernel: Kernel, isa: str) -> tuple[Head, bytes]:
    """Symbol and arguments ("symbol", "arguments"), and object code, compiled in this process."""
    if kernel.name in TILE_KERNELS:
        return _compile_tile(kernel, isa)
    from runtime.backends.cpu.kernels.compile import compile_kernel

    return compile_kernel(kernel, isa)


def _compile_tile(kernel: Kernel, isa: str) -> tuple[Head, bytes]:
    from runtime.backends.cpu.compile import objects
    from runtime.backends.cpu.tile.emit import emit_matmul
    from runtime.backends.cpu.tile.get_rows import emit_get_rows
    from runtime.backends.cpu.tile.pack import emit_pack
    from runtime.backends.cpu.tile.packed_rows import emit_packed_rows
    from runtime.backends.cpu.tile.spec import (
        GET_ROWS_ARGS,
        PACK_ARGS,
        PACKED_ROWS_ARGS,
        TileSpec,
    )

    constants, arguments = dict(kernel.constants), PACK_ARGS
    if kernel.name == "pack_weights":
        module = emit_pack(constants["format"], isa)
    elif kernel.name == "get_rows":
        module, arguments = emit_get_rows(constants["format"], isa), GET_ROWS_ARGS
    elif kernel.name == "get_packed_rows":
        module, arguments = emit_packed_rows(constants["format"], isa), PACKED_ROWS_ARGS
    else:
        spec = TileSpec(**constants, indirect=kernel.name == "matmul_id")
        module, arguments = emit_matmul(spec, isa), spec.arguments
    return {"symbol": objects.ENTRY, "arguments": arguments}, objects.compile_ir(module, isa)


def compile_all(
    kernels: list[Kernel], isa: str, progress: Progress | None = None
) -> Generator[tuple[Kernel, Head, bytes], None, None]:
    """Compile in parallel processes; yields kernels as `compile_one` gives them, as they finish.

    BackendError names the kernel that failed and the compiler's last line.
    """
    environment = {**os.environ, "NUMBA_NUM_THREADS": "1"}
    environment.pop("RUNTIME_CPU_ISA", None)
    slow_first = sorted(kernels, key=lambda k: k.name in TILE_KERNELS)
    with pool.Pool(__name__, isa, "CPU", environment) as processes:
        yield from processes.compile(slow_first, len(kernels), progress)


def serve(isa: str) -> None:
    """The loop of a compile process for one instruction set."""
    pool.serve(lambda kernel: compile_one(kernel, isa))
