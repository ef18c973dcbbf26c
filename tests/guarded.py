"""Memory of a program of a guarded plan: poisoned before a step, looked at behind it."""

from __future__ import annotations

from runtime.backends.cpu.run.program import Program
from runtime.backends.plan.plan import GUARD

_CANARY = 0xA5


def poison(program: Program) -> None:
    """Fill the arena so that unwritten results are NaN and stray writes break canaries."""
    program._arena[:] = _CANARY
    for buffer in program.plan.buffers():
        if buffer.memory == "arena":
            program._arena[buffer.offset : buffer.offset + buffer.nbytes] = 0xFF


def damaged(program: Program) -> list[str]:
    """Names of the buffers that something wrote past the end of."""
    return [
        buffer.key
        for buffer in program.plan.buffers()
        if buffer.memory == "arena"
        and (program._arena[buffer.offset + buffer.nbytes :][:GUARD] != _CANARY).any()
    ]
