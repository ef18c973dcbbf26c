"""Compile processes: each takes kernels one at a time over pipes and sends object code back.

They are separate programs because Numba is slow to import, fixed to one target per process, and
none of the parent's business once its object code is on disk.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from runtime.backends.cpu.kernel import Kernel
from runtime.ops.errors import BackendError

_PROGRAM = (
    "import json, sys; sys.path[:0] = json.loads(sys.argv.pop(1)); "
    "import runtime.gguf; from runtime.backends.cpu.compilers import serve; serve(sys.argv[1])"
)
_SECONDS = 300  # no kernel takes a tenth of it; a hung compiler must not hang the user


def compile_one(kernel: Kernel, isa: str) -> tuple[str, bytes]:
    """Symbol and object code of a kernel, compiled in this process."""
    from runtime.backends.cpu.library import is_numba

    if not is_numba(kernel):
        return _compile_tile(kernel, isa)
    from runtime.backends.cpu.kernels.compile import compile_kernel

    code, symbol = compile_kernel(kernel.name, dict(kernel.constants), isa)
    return symbol, code


def _compile_tile(kernel: Kernel, isa: str) -> tuple[str, bytes]:
    from runtime.backends.cpu import objects
    from runtime.backends.cpu.tile import TileSpec, emit_matmul, emit_pack

    constants = dict(kernel.constants)
    if kernel.name == "pack_weights":
        module = emit_pack(constants["format"], isa)
    else:
        module = emit_matmul(TileSpec(**constants, indirect=kernel.name == "matmul_id"), isa)
    return objects.ENTRY, objects.compile_ir(module, isa)


def compile_all(
    kernels: list[Kernel], isa: str, progress: Any = None
) -> Iterator[tuple[Kernel, str, bytes]]:
    """Compile in parallel processes; yields (kernel, symbol, object code) as they finish.

    BackendError names the kernel that failed and the compiler's last line.
    """
    from runtime.backends.cpu.library import is_numba

    todo: queue.SimpleQueue[Kernel] = queue.SimpleQueue()
    for kernel in sorted(kernels, key=lambda k: not is_numba(k)):  # the slow ones first
        todo.put(kernel)
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    count = min(len(kernels), os.cpu_count() or 1)
    workers = [threading.Thread(target=_feed, args=(todo, done, isa)) for _ in range(count)]
    for worker in workers:
        worker.daemon = True
        worker.start()
    for n in range(len(kernels)):
        if progress:
            progress(n, len(kernels), "compiling kernels")
        try:
            result = done.get(timeout=_SECONDS)
        except queue.Empty:
            raise BackendError(f"compiling CPU kernels made no progress for {_SECONDS} s") from None
        if isinstance(result, Exception):
            raise result
        yield result
    if progress:
        progress(len(kernels), len(kernels), "compiling kernels")


def _feed(todo: Any, done: Any, isa: str) -> None:
    """Give one compile process kernel after kernel until there are none."""
    try:
        with _start(isa) as process:
            while True:
                try:
                    kernel = todo.get_nowait()
                except queue.Empty:
                    break
                done.put((kernel, *_ask(process, kernel)))
            process.stdin.close()
    except Exception as error:  # the waiting side raises it
        done.put(error)


def _start(isa: str) -> Any:
    paths = json.dumps([p or str(Path.cwd()) for p in sys.path])
    environment = {**os.environ, "NUMBA_NUM_THREADS": "1"}
    environment.pop("RUNTIME_CPU_ISA", None)
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, paths, isa], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip


def _ask(process: Any, kernel: Kernel) -> tuple[str, bytes]:
    try:
        process.stdin.write(kernel.dump().encode() + b"\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        header = json.loads(answer) if answer else {"error": "the compiler process ended"}
    except OSError as error:
        header = {"error": str(error)}
    if "error" in header:
        process.stdin.close()
        log = process.stderr.read().decode(errors="replace").strip().splitlines()
        detail = f" ({log[-1]})" if log else ""
        raise BackendError(f"compiling CPU kernel {kernel} failed: {header['error']}{detail}")
    return header["symbol"], process.stdout.read(header["nbytes"])


def serve(isa: str) -> None:
    """The loop of a compile process: a kernel per line in, a header line and object code out."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing a library prints may come between the answers
    for line in source:
        _answer(Kernel.parse(line.decode()), isa, sink)


def _answer(kernel: Kernel, isa: str, sink: BinaryIO) -> None:
    try:
        symbol, code = compile_one(kernel, isa)
        header: dict[str, Any] = {"symbol": symbol, "nbytes": len(code)}
    except Exception as error:
        if os.environ.get("DEBUG") == "4":
            raise
        first = str(error).strip().splitlines() or [""]
        header, code = {"error": f"{type(error).__name__}: {first[0]}"}, b""
    sink.write(json.dumps(header).encode() + b"\n" + code)
    sink.flush()
