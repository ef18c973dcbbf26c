"""What a kernel became: its machine instructions, counted, with no GPU.

A loop is what a backward branch jumps over; instructions are counted as they stand in the code.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from runtime.ops.errors import BackendError

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;", re.M)
_BRANCH = re.compile(r"\bBRA(?:\.\w+)* .*?(?:`\(\.L_x_(\d+)\)|0x([0-9a-f]+))")
_LABEL = re.compile(r"^\.L_x_(\d+):", re.M)


@dataclass(frozen=True)
class Loop:
    """The instructions between a backward branch and its target."""

    instructions: tuple[str, ...]

    def count(self, *names: str) -> int:
        """Instructions whose opcode begins with one of `names`."""
        return count(self.instructions, *names)

    def per(self, *names: str) -> float:
        """Instructions of the loop for each one of `names`; infinite without any."""
        found = self.count(*names)
        return len(self.instructions) / found if found else float("inf")


@functools.lru_cache(maxsize=256)
def disassemble(code: bytes) -> tuple[str, ...]:
    """The instructions of a cubin in order, labels as lines "name:".

    BackendError: the disassembler (package nvidia-cuda-nvdisasm) is not installed or fails.
    """
    program = find_disassembler()
    if program is None:
        raise BackendError("nvdisasm is missing: pip install nvidia-cuda-nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(code)
        done = subprocess.run([program, "-c", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise BackendError(f"nvdisasm failed: {done.stderr.strip()[:200]}")
    return _instructions(done.stdout)


@functools.cache
def find_disassembler() -> str | None:
    """The path of nvdisasm, from its package or the PATH."""
    import shutil
    import sysconfig

    packaged = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin" / "nvdisasm"
    return str(packaged) if packaged.is_file() else shutil.which("nvdisasm")


def _instructions(listing: str) -> tuple[str, ...]:
    found = []
    for line in listing.splitlines():
        label, instruction = _LABEL.match(line), _LINE.match(line)
        if label:
            found.append(f"{label[1]}:")
        elif instruction:
            found.append(re.sub(r"\s+", " ", instruction[2]))
    return tuple(found)


def opcode(instruction: str) -> str:
    """`LDG.E.128` of `@P0 LDG.E.128 R4, [R2.64]`."""
    words = instruction.split()
    return words[1] if words[0].startswith("@") and len(words) > 1 else words[0]


def count(instructions: tuple[str, ...], *names: str) -> int:
    """Instructions whose opcode begins with one of `names`."""
    return sum(opcode(i).startswith(names) for i in instructions)


def loops(instructions: tuple[str, ...]) -> list[Loop]:
    """Every loop, inner ones too, in the order of their branches."""
    places = {line[:-1]: n for n, line in enumerate(instructions) if line.endswith(":")}
    found = []
    for n, line in enumerate(instructions):
        branch = _BRANCH.search(line)
        if branch and branch[1] and places.get(branch[1], n) < n:
            body = instructions[places[branch[1]] : n + 1]
            found.append(Loop(tuple(i for i in body if not i.endswith(":"))))
    return found
