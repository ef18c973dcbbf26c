"""Compile processes: each takes kernels one at a time over pipes and sends code back.

They are separate programs because Numba is slow to import, compiles under one lock for one target,
and is none of the parent's business once the code is on disk. They end with whoever waits for
them: when all is done, when one fails, when the user interrupts.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

from runtime.backends.base import Progress
from runtime.backends.plan.kernel import Kernel
from runtime.backends.plan.library import Head
from runtime.ops.errors import BackendError

_PROGRAM = (
    # a Ctrl-C in the terminal is the parent's, which ends this process
    "import json, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "sys.path[:0] = json.loads(sys.argv.pop(1)); "
    "import runtime.gguf; from {module} import serve; serve(sys.argv[1])"
)
_SECONDS = 300  # no kernel takes a tenth of it; a hung compiler must not hang the user
_GRACE = 1.0  # seconds that a process killed has to be gone


class Pool:
    """Compile processes for one target; a context manager, which ends them.

    module: has `serve(target)`, the loop of a process. device: "CPU" or "CUDA", for messages.
    """

    def __init__(
        self, module: str, target: str, device: str, environment: Mapping[str, str] | None = None
    ) -> None:
        paths = json.dumps([p or str(Path.cwd()) for p in sys.path])
        program = _PROGRAM.format(module=module)
        self._command = [sys.executable, "-c", program, paths, target]
        self._device, self._environment = device, environment
        self._threads: list[threading.Thread] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ended = False

    def compile(
        self, kernels: Sequence[Kernel], most: int, progress: Progress | None = None
    ) -> Iterator[tuple[Kernel, Head, bytes]]:
        """Heads and code of the kernels, from up to `most` processes, as they finish.

        BackendError names the kernel that failed and the compiler's last line.
        """
        todo: queue.SimpleQueue[Kernel] = queue.SimpleQueue()
        for kernel in kernels:
            todo.put(kernel)
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(min(len(kernels), most, os.cpu_count() or 1)):
            self._start_feeder(todo, done)
        what = f"compiling {self._device} kernels"
        for n in range(len(kernels)):
            if progress:
                progress(n, len(kernels), what)
            try:
                result = done.get(timeout=_SECONDS)
            except queue.Empty:
                raise BackendError(f"{what} made no progress for {_SECONDS} s") from None
            if isinstance(result, Exception):
                raise result
            yield result
        if progress:
            progress(len(kernels), len(kernels), what)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        for process in list(self._processes):
            process.kill()
        for thread in self._threads:
            thread.join(_GRACE)

    def _start_feeder(self, todo: Any, done: Any) -> None:
        feeder = threading.Thread(target=self._feed, args=(todo, done), daemon=True)
        try:
            feeder.start()
        except RuntimeError as error:
            if not self._threads:
                raise BackendError(
                    f"kernels cannot be compiled: no thread can be started ({error}); raise the "
                    "system's limit (`ulimit -u`; memory; in a container its number of processes)"
                ) from None
            return  # those that run do all
        self._threads.append(feeder)

    def _feed(self, todo: Any, done: Any) -> None:
        """Give one compile process kernel after kernel until there are none."""
        try:
            with self._process() as process:
                with contextlib.suppress(queue.Empty):
                    while True:
                        kernel = todo.get_nowait()
                        done.put((kernel, *self._ask(process, kernel)))
                process.stdin.close()
        except Exception as error:  # the waiting side raises it
            done.put(error)

    def _process(self) -> Any:
        try:
            process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, env=self._environment,
            )  # fmt: skip
        except OSError as error:
            raise BackendError(
                f"kernels cannot be compiled: no process can be started ({error.strerror})"
            ) from None
        self._processes.append(process)
        if self._ended:  # while it was started
            process.kill()
        return process

    def _ask(self, process: Any, kernel: Kernel) -> tuple[Head, bytes]:
        try:
            process.stdin.write(kernel.dump().encode() + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            header = json.loads(answer) if answer else {"error": "the compiler process ended"}
        except OSError as error:
            header = {"error": str(error)}
        if "error" in header:
            with contextlib.suppress(OSError):
                process.stdin.close()
            log = process.stderr.read().decode(errors="replace").strip().splitlines()
            detail = f" ({log[-1]})" if log else ""
            raise BackendError(
                f"compiling {self._device} kernel {kernel} failed: {header['error']}{detail}"
            )
        return header, process.stdout.read(header.pop("nbytes"))


def serve(compile_one: Callable[[Kernel], tuple[Head, bytes]]) -> None:
    """The loop of a compile process: a kernel per line in, a header line and code out."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing a library prints may come between the answers
    for line in source:
        _answer(compile_one, Kernel.parse(line.decode()), sink)


def _answer(
    compile_one: Callable[[Kernel], tuple[Head, bytes]], kernel: Kernel, sink: BinaryIO
) -> None:
    try:
        header, code = compile_one(kernel)
    except Exception as error:
        if os.environ.get("DEBUG") == "4":
            raise
        lines = str(error).strip().splitlines()[:2]  # numba: the step, then the cause
        header, code = {"error": f"{type(error).__name__}: {' '.join(lines)}"}, b""
    sink.write(json.dumps({**header, "nbytes": len(code)}).encode() + b"\n" + code)
    sink.flush()
