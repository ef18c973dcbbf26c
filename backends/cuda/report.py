"""What every kernel became, as a table: `python -m runtime.backends.cuda.report sm_80 sm_90a`.

Registers, bytes spilled and bytes of shared memory (static + dynamic), warps of a multiprocessor
by registers alone, and the innermost loop that does the kernel's work: its instructions, those for
each dp4a or mma, and its loads of 16 bytes; in a checkout also how many for each dp4a nvcc makes of
the same loop (`scripts/gate_nvcc.py`). Needs the extra `cuda`, and no GPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runtime.backends.plan.kernel import Kernel
from runtime.ops.errors import BackendError

from . import sass
from .catalogue import KERNELS, Compiled
from .library import Library, library

_WORK = ("IDP.4A", "IMMA", "HMMA", "LDG")  # what a loop is for, the first that is there
_REGISTERS = 65536  # of a multiprocessor
_COUNTS = ("registers", "spilled", "shared", "warps", "bytes", "instructions")
_HEAD = ("kernel", *_COUNTS, "loop", "per", "nvcc", "16-byte")
_NVCC = Path(__file__).resolve().parents[2] / "tests" / "data" / "matvec_loops.json"


@dataclass(frozen=True)
class Figures:
    """Counts of one compiled kernel; `loop`, `per_work` and `wide_loads` of its main loop.

    `per_work`: instructions of that loop for each one of `work` (0 without a loop).
    """

    instructions: int
    work: str
    loop: int
    per_work: float
    wide_loads: int


def figures(compiled: Compiled) -> Figures:
    """Count a kernel's instructions. BackendError: nvdisasm is missing."""
    code = sass.disassemble(compiled.code)
    total = sum(not line.endswith(":") and sass.opcode(line) != "NOP" for line in code)
    for work in _WORK:
        found = [loop for loop in sass.loops(code) if loop.count(work)]
        if found:
            main = min(found, key=lambda loop: loop.per(work))
            wide = sum(".128" in sass.opcode(i) for i in main.instructions if "LDG" in i)
            return Figures(total, work, len(main.instructions), main.per(work), wide)
    return Figures(total, "", 0, 0.0, 0)


def warps(compiled: Compiled) -> int:
    """Warps of a multiprocessor that the registers leave room for, at most 64."""
    per_warp = -(-compiled.registers * 32 // 256) * 256
    per_block = compiled.entry.threads // 32
    return min(64, _REGISTERS // (per_warp * per_block) * per_block)


def nvcc_loops() -> dict[str, float]:
    """ "target format columns" -> instructions for each dp4a as nvcc makes the loop of `matvec`.

    Empty where no checkout is.
    """
    return json.loads(_NVCC.read_text("utf-8")) if _NVCC.exists() else {}


def table(
    kernels: Library, listed: list[Kernel] | None = None, nvcc: Mapping[str, float] | None = None
) -> list[str]:
    """Lines of a Markdown table of kernels, by default of all, compiling what is missing.

    nvcc: as `nvcc_loops` gives it, by default that.
    """
    nvcc = nvcc_loops() if nvcc is None else nvcc
    listed = KERNELS.every() if listed is None else listed
    kernels.prepare(listed)
    lines = [" | ".join(["", *_HEAD, ""]).strip(), "| --- " + "| ---: " * (len(_HEAD) - 1) + "|"]
    for kernel in listed:
        found = kernels.get(kernel)
        f = figures(found)
        per = f"{f.per_work:.2f} {f.work}"
        peer = _of_nvcc(kernel, kernels.target, nvcc)
        loop = (str(f.loop), per, peer, str(f.wide_loads)) if f.loop else ("",) * 4
        shared = found.shared_nbytes + found.entry.shared_nbytes
        numbers = (found.registers, found.spilled, shared, warps(found), len(found.code))
        cells = [str(kernel), *map(str, numbers), str(f.instructions), *loop]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _of_nvcc(kernel: Kernel, target: str, nvcc: Mapping[str, float]) -> str:
    constants = dict(kernel.constants)
    case = f"{target} {constants.get('format')} {constants.get('columns')}"
    return f"{nvcc[case]:.2f}" if kernel.name == "matvec" and case in nvcc else ""


def main(targets: list[str]) -> None:
    """Print a table for each target."""
    for target in targets or ["sm_80", "sm_90a"]:
        print(f"\n{target}\n")
        print("\n".join(table(library(target))))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BackendError as error:
        sys.exit(f"error: {error}")
