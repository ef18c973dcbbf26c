"""Compile processes: each takes kernels one at a time over pipes and sends code back.

They are separate programs because numba compiles under one lock, is slow to import, and is none of
the parent's business once the code is on disk.
"""

from __future__ import annotations

import importlib.util
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

from .catalogue import Compiled, from_head, head

_PROGRAM = (
    "import json, sys; sys.path[:0] = json.loads(sys.argv.pop(1)); "
    "from runtime.backends.cuda.compilers import serve; serve(sys.argv[1])"
)
_SECONDS = 300  # no kernel takes a tenth of it; a hung compiler must not hang the user


def compile_all(
    kernels: list[Kernel], target: str, progress: Any = None
) -> Iterator[tuple[Kernel, Compiled]]:
    """Compile in parallel processes; yields kernels as they finish.

    BackendError names the kernel that failed, or the extra to install.
    """
    require_toolchain()
    todo: queue.SimpleQueue[Kernel] = queue.SimpleQueue()
    for kernel in kernels:
        todo.put(kernel)
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for _ in range(min(-(-len(kernels) // 4), os.cpu_count() or 1)):
        threading.Thread(target=_feed, args=(todo, done, target), daemon=True).start()
    for n in range(len(kernels)):
        if progress:
            progress(n, len(kernels), "compiling CUDA kernels")
        try:
            result = done.get(timeout=_SECONDS)
        except queue.Empty:
            raise BackendError(f"compiling made no progress for {_SECONDS} s") from None
        if isinstance(result, Exception):
            raise result
        yield result
    if progress:
        progress(len(kernels), len(kernels), "compiling CUDA kernels")


def require_toolchain() -> None:
    """BackendError saying what to install where kernels cannot be compiled."""
    if not all(importlib.util.find_spec(name) for name in ("numba_cuda", "cuda")):
        raise BackendError(
            "CUDA kernels are compiled by numba-cuda, which is not installed: "
            "pip install 'graph-runtime[cuda]' (Linux x86-64)"
        )


def _feed(todo: Any, done: Any, target: str) -> None:
    """Give one compile process kernel after kernel until there are none."""
    try:
        with _start(target) as process:
            while True:
                try:
                    kernel = todo.get_nowait()
                except queue.Empty:
                    break
                done.put((kernel, _ask(process, kernel)))
            process.stdin.close()
    except Exception as error:  # the waiting side raises it
        done.put(error)


def _start(target: str) -> Any:
    paths = json.dumps([p or str(Path.cwd()) for p in sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, paths, target], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def _ask(process: Any, kernel: Kernel) -> Compiled:
    try:
        process.stdin.write(kernel.dump().encode() + b"\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        header: Any = json.loads(answer) if answer else {"error": "the compiler process ended"}
    except OSError as error:
        header = {"error": str(error)}
    if "error" in header:
        process.stdin.close()
        log = process.stderr.read().decode(errors="replace").strip().splitlines()
        detail = f" ({log[-1]})" if log else ""
        raise BackendError(f"compiling CUDA kernel {kernel} failed: {header['error']}{detail}")
    return from_head(header["head"], process.stdout.read(header["nbytes"]))


def serve(target: str) -> None:
    """The loop of a compile process: a kernel per line in, a header line and code out."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing a library prints may come between the answers
    for line in source:
        _answer(Kernel.parse(line.decode()), target, sink)


def _answer(kernel: Kernel, target: str, sink: BinaryIO) -> None:
    code = b""
    try:
        from .compile import compile_kernel

        compiled = compile_kernel(kernel, target)
        code = compiled.code
        header: dict[str, Any] = {"head": head(compiled), "nbytes": len(code)}
    except Exception as error:
        if os.environ.get("DEBUG") == "4":
            raise
        lines = " ".join(str(error).strip().splitlines()[:2])  # numba: the step, then the cause
        header = {"error": f"{type(error).__name__}: {lines}"}
    sink.write(json.dumps(header).encode() + b"\n" + code)
    sink.flush()
