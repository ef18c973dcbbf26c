"""A plan: instructions in order, the buffers they touch, and where barriers must stand."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from runtime.backends.cpu.kernel import Kernel
from runtime.ops.tensor import Tensor

ALIGNMENT = 64  # of buffers: a cache line, and a 512-bit vector
GUARD = 64  # bytes after a buffer that a guarded plan checks for stray writes


@dataclass(eq=False)
class Buffer:
    """Memory of a plan. `kind`: arena, scratch, input, count, constant, state, or a form of weight.

    `offset` is set by the memory planner for arena buffers; `key` finds the others.
    """

    kind: str
    key: str
    nbytes: int
    offset: int = -1
    tensor: Tensor | None = None

    def __str__(self) -> str:
        return f"@{self.offset}" if self.kind == "arena" else self.key


@dataclass(frozen=True)
class Ref:
    """An address that is known when the plan is bound to memory: a buffer and bytes into it."""

    buffer: Buffer
    offset: int = 0


@dataclass
class Instruction:
    """One row of the instruction table: a kernel and its arguments (addresses or integers).

    `barrier`: all threads meet before it, because it touches what an earlier one wrote or reads
    what it is about to overwrite. `level` counts barriers up to it.
    """

    kernel: Kernel
    arguments: dict[str, int | Ref]
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    node: Tensor
    barrier: bool = False
    level: int = 0
    nbytes: int = 0  # read and written at full capacity, for bandwidth figures


@dataclass
class Plan:
    """Instructions, buffers and the bytes of the arena they share."""

    name: str
    instructions: list[Instruction]
    outputs: list[Ref]
    output_tensors: tuple[Tensor, ...]
    counts: dict[tuple[str, int], int] = field(default_factory=dict)  # (dim, factor) -> slot
    arena_nbytes: int = 0
    scratch_nbytes: int = 0

    def kernels(self) -> list[Kernel]:
        """The kernels it needs, each once, in order of first use."""
        return list(dict.fromkeys(i.kernel for i in self.instructions))

    def buffers(self) -> list[Buffer]:
        """All buffers, each once, in order of first use."""
        found = dict.fromkeys(b for i in self.instructions for b in (*i.reads, *i.writes))
        return list(found)

    def copies(self) -> int:
        """Instructions that only move data: a good plan has none."""
        return sum(i.kernel.name == "copy" for i in self.instructions)

    def __str__(self) -> str:
        lines = [
            f"{self.name}: {len(self.instructions)} instructions, "
            f"{sum(i.barrier for i in self.instructions)} barriers, {self.copies()} copies, "
            f"arena {self.arena_nbytes} bytes"
        ]
        for n, i in enumerate(self.instructions):
            mark = "|" if i.barrier else " "
            writes = ", ".join(map(str, i.writes))
            reads = ", ".join(str(b) for b in i.reads if b.kind not in ("count", "scratch"))
            lines.append(f"{n:4} {mark} {i.kernel!s:44} {writes} <- {reads}")
        return "\n".join(lines)

    def summary(self) -> str:
        """One line per kernel with how often it stands in the table."""
        found = Counter(str(i.kernel) for i in self.instructions)
        return "\n".join(f"{n:5} x {kernel}" for kernel, n in found.most_common())


def set_barriers(instructions: list[Instruction]) -> None:
    """A barrier before each instruction that depends on one since the last barrier.

    Buffers are compared whole: splitting one between threads differently in two instructions is
    always safe. State and arena buffers count alike.
    """
    read: set[Buffer] = set()
    written: set[Buffer] = set()
    level = 0
    for instruction in instructions:
        reads, writes = set(instruction.reads), set(instruction.writes)
        if reads & written or writes & (written | read):
            instruction.barrier = True
            level += 1
            read, written = set(), set()
        read |= reads
        written |= writes
        instruction.level = level


def place_buffers(plan: Plan, guarded: bool = False) -> None:
    """Give arena buffers offsets, reusing memory of buffers whose last level has passed.

    First fit over the buffers that live at the same time, largest first within a start level.
    With `guarded` nothing is reused and GUARD bytes follow every buffer.
    """
    lives: dict[Buffer, list[int]] = {}
    for instruction in plan.instructions:
        for buffer in (*instruction.reads, *instruction.writes):
            if buffer.kind == "arena":
                lives.setdefault(buffer, []).append(instruction.level)
    for ref in plan.outputs:
        lives.setdefault(ref.buffer, [0]).append(1 << 30)
    placed: list[tuple[int, int, int, int]] = []  # offset, end, first level, last level
    for buffer, levels in sorted(lives.items(), key=lambda item: (min(item[1]), -item[0].nbytes)):
        first, last = (0, 1 << 30) if guarded else (min(levels), max(levels))
        size = -(-(buffer.nbytes + GUARD * guarded) // ALIGNMENT) * ALIGNMENT
        buffer.offset = _first_fit(placed, size, first, last)
        placed.append((buffer.offset, buffer.offset + size, first, last))
    plan.arena_nbytes = max((end for _, end, _, _ in placed), default=0)


def _first_fit(placed: list[tuple[int, int, int, int]], size: int, first: int, last: int) -> int:
    at = 0
    for offset, end, start, stop in sorted(placed):
        if stop < first or start > last:
            continue
        if offset - at >= size:
            break
        at = max(at, end)
    return at
