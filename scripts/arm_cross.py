"""Compile process of an emulated Arm machine, run on the x86 host: minutes become seconds.

    python scripts/arm_cross.py ISA        (a program of scripts/check_arm.sh)

Speaks the protocol of `runtime.backends.plan.pool.serve`: a kernel per line in, a header line
and object code out. A line {"ir": text} is LLVM IR to compile, as tests of kernels do. The process
tells everything that asks, Numba and this package, that it is on 64-bit Arm Linux.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

TRIPLE = "aarch64-unknown-linux-gnu"


def pretend() -> None:
    """Be on 64-bit Arm. Before the package and Numba are imported."""
    import llvmlite.binding as llvm
    from llvmlite.binding import targets

    platform.machine = lambda: "aarch64"
    uname = os.uname_result((*os.uname()[:4], "aarch64"))
    os.uname = lambda: uname
    for module in (llvm, targets):
        for name in ("get_process_triple", "get_default_triple"):
            setattr(module, name, lambda: TRIPLE)
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()


def answer(line: str, isa: str) -> tuple[dict[str, Any], bytes]:
    """Head and object code of what a line asks for."""
    from runtime.backends.cpu.compile import compilers, objects
    from runtime.backends.plan.kernel import Kernel

    asked = json.loads(line)
    if isinstance(asked, dict):
        return {"symbol": objects.ENTRY}, objects.compile_ir(asked["ir"], isa)
    return compilers.compile_one(Kernel.parse(line), isa)


def main(isa: str) -> None:
    """The loop of the process."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    for line in source:
        try:
            header, code = answer(line.decode(), isa)
            header["nbytes"] = len(code)
        except Exception as error:
            first = str(error).strip().splitlines() or [""]
            header, code = {"error": f"{type(error).__name__}: {first[0]}"}, b""
        sink.write(json.dumps(header).encode() + b"\n" + code)
        sink.flush()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    pretend()
    import runtime.gguf  # noqa: F401  (provides the code books)

    main(sys.argv[1])
