"""pytest plugin of an emulated Arm machine: what tests compile, one process on the host compiles.

    python -m pytest -p arm_plugin ...        (as scripts/check_arm.sh does)

The compile processes of a run are those of scripts/arm_cross.py already, by the Python that
check_arm.sh makes; this keeps one per instruction set for all tests of a run.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import threading
from collections.abc import Generator
from typing import Any

from runtime.backends.cpu.compile import compilers, objects
from runtime.backends.plan.kernel import Kernel
from runtime.ops.errors import BackendError


class HostCompiler:
    """A compile process; one question at a time."""

    def __init__(self, isa: str) -> None:
        # `python-arm` takes whatever imports `serve` for a compile process, by these places.
        command = [sys.executable, "-c", "import serve", "[]", isa]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
        self.lock = threading.Lock()

    def ask(self, question: str) -> tuple[dict[str, Any], bytes]:
        """Head and object code of a line; BackendError with what the process says."""
        source, sink, log = self.process.stdout, self.process.stdin, self.process.stderr
        assert source and sink and log, "all three are pipes"
        with self.lock:
            sink.write(question.encode() + b"\n")
            sink.flush()
            answer = source.readline()
            header = json.loads(answer) if answer else {"error": log.read()[-500:]}
            if "error" in header:
                raise BackendError(str(header["error"]).removeprefix("BackendError: "))
            return header, source.read(header.pop("nbytes"))


host_compiler = functools.cache(HostCompiler)


def compile_ir(ir: str, isa_name: str) -> bytes:
    """In the place of `objects.compile_ir`."""
    return host_compiler(isa_name).ask(json.dumps({"ir": ir}))[1]


def compile_all(
    kernels: list[Kernel], isa: str, progress: Any = None
) -> Generator[tuple[Kernel, dict[str, Any], bytes], None, None]:
    """In the place of `compilers.compile_all`."""
    for kernel in kernels:
        yield kernel, *host_compiler(isa).ask(kernel.dump())


objects.compile_ir = compile_ir
compilers.compile_all = compile_all
