"""A plan: instructions, each some kernel calls, in order, and the buffers they touch."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from runtime.backends.plan.kernel import Kernel
from runtime.ops.registry import Kind, find
from runtime.ops.tensor import Tensor

ALIGNMENT = 64  # of buffers: a cache line, and a 512-bit vector
GUARD = 64  # bytes after a buffer that a guarded plan checks for stray writes
JOINT = ("part", "whole", "parts", "member", "meeting", "peer")  # memories of buffers: see Buffer
WEIGHTS = ("raw", "vector", "turns", "repacked")  # memories of buffers that are forms of weights
KEPT = 1 << 30  # the moment until which outputs are in use
Key = TypeVar("Key", bound=Hashable)


@dataclass(eq=False)
class Buffer:
    """Bytes that calls read and write.

    `memory`, where they are: arena, scratch, input, count, constant, state, or a form of weight.
    Where devices share a graph (JOINT) also the `part` of one that all read, a `whole` that they
    have in common, addresses of `parts`, a `member`'s number, where the `meeting` is, and what a
    `peer` gives.
    `offset` is set by the memory planner for arena buffers; the others are found by `content`, and
    `key` is what plans call them.
    """

    memory: str
    key: str
    nbytes: int
    offset: int = -1
    tensor: Tensor | None = None

    @property
    def content(self) -> Hashable:
        """What decides the numbers of a buffer outside the arena: equal ones are one."""
        return self.memory, self.key if self.tensor is None else self.tensor.content

    def __str__(self) -> str:
        return f"@{self.offset}" if self.memory == "arena" else self.key


class Ref(NamedTuple):
    """An address that is known when the plan is bound to memory: a buffer and bytes into it."""

    buffer: Buffer
    offset: int = 0


Argument = int | float | Ref  # of a kernel


class Share(NamedTuple):
    """A call that divides the last axis of some of its arguments between the threads.

    The axis has `length` elements in units of SHARE_UNIT, and of all rows alike thread t of n takes
    the units u * t // n up to u * (t + 1) // n. A kernel with a share promises that a thread reads
    and writes nothing of `arguments` outside its own units. What a thread reads of such a buffer
    after a call with the same division is therefore what it wrote itself, in the order of the
    program, and no barrier is needed between the two.
    """

    length: int
    arguments: tuple[str, ...]


@dataclass
class Call:
    """One kernel with its arguments (addresses or numbers), made by every thread.

    `own`: of these buffers a thread touches its own part alone; see Share, whose length `divided`
    repeats (0: none). `grid`: of a device that launches kernels, how many blocks of threads, along
    up to three axes. `library`: what does it in place of a kernel of ours.
    """

    kernel: Kernel
    arguments: dict[str, Argument]
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    node: Tensor
    divided: int = 0
    own: frozenset[Buffer] = frozenset()
    grid: tuple[int, ...] = ()
    library: str = ""

    @property
    def meets(self) -> bool:
        """Whether it begins with a meeting of all devices: what its threads did before is done."""
        return any(buffer.memory == "meeting" for buffer in self.writes)

    def aligned(self, other: Call, buffer: Buffer) -> bool:
        """Whether no thread touches what another thread touches of `buffer` in these two calls."""
        return self.divided == other.divided and buffer in self.own and buffer in other.own


@dataclass(frozen=True)
class Instruction:
    """Calls that every thread makes one after the other.

    All threads meet before an instruction, and nowhere inside: its calls are independent of each
    other, or need just what the same thread wrote.
    """

    calls: tuple[Call, ...]

    @property
    def reads(self) -> tuple[Buffer, ...]:
        """Buffers that any call reads, each once."""
        return tuple(dict.fromkeys(b for c in self.calls for b in c.reads))

    @property
    def writes(self) -> tuple[Buffer, ...]:
        """Buffers that any call writes, each once."""
        return tuple(dict.fromkeys(b for c in self.calls for b in c.writes))

    def __str__(self) -> str:
        counted = Counter(str(c.kernel) for c in self.calls)
        return " + ".join(f"{n} x {name}" if n > 1 else name for name, n in counted.items())


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
    results: dict[Tensor, Buffer] = field(default_factory=dict)  # where each computed tensor lies
    parts: dict[int, Ref] = field(default_factory=dict)  # what it gives to collectives, by number

    def calls(self) -> list[Call]:
        """The calls of all instructions in order."""
        return [c for i in self.instructions for c in i.calls]

    def kernels(self) -> list[Kernel]:
        """The kernels it needs, each once, in order of first use."""
        return list(dict.fromkeys(c.kernel for c in self.calls() if not c.library))

    def buffers(self) -> list[Buffer]:
        """All buffers, each once, in order of first use."""
        found = dict.fromkeys(b for c in self.calls() for b in (*c.reads, *c.writes))
        return list(found)

    def copies(self) -> int:
        """Calls that only move data: copies of views, and rows picked from activations."""
        return sum(map(_moves, self.calls()))

    def __str__(self) -> str:
        lines = [
            f"{self.name}: {len(self.instructions)} instructions, {len(self.calls())} calls, "
            f"{self.copies()} copies, arena {self.arena_nbytes} bytes"
        ]
        for n, instruction in enumerate(self.instructions):
            for first, call in enumerate(instruction.calls):
                writes = ", ".join(map(str, call.writes))
                reads = ", ".join(
                    str(b) for b in call.reads if b.memory not in ("count", "scratch")
                )
                number = "" if first else f"{n}"
                lines.append(f"{number:>4} {call.kernel!s:44} {writes} <- {reads}")
        return "\n".join(lines)

    def summary(self) -> str:
        """One line per kernel with how often it is called."""
        found = Counter(str(c.kernel) for c in self.calls())
        return "\n".join(f"{n:5} x {kernel}" for kernel, n in found.most_common())


def _moves(call: Call) -> bool:
    op = find(call.node.op)
    picked = op.kind is Kind.GATHER and op.flops == 0 and call.node.inputs[0].op != "weight"
    return picked or op.kind is Kind.COPY


def weight_buffers(plans: Sequence[Plan]) -> list[Buffer]:
    """The weights these plans read, each form once, in order of use."""
    found = {b.content: b for plan in plans for b in plan.buffers() if b.memory in WEIGHTS}
    return list(found.values())


def schedule(calls: Sequence[Call]) -> list[Instruction]:
    """Calls in an order that computes the right thing, in as few instructions as they need.

    A call stands in the first instruction behind all that it depends on: behind the one that writes
    what it reads, and behind those that read or write what it overwrites. Where the two calls are
    aligned in that buffer, or the later one begins with a meeting, it may stand in the same one.
    Inside one calls keep their order.
    Buffers are compared whole, state and arena alike.
    """
    found: list[list[Call]] = []
    touched: dict[Buffer, list[tuple[Call, int]]] = {}
    written: dict[Buffer, list[tuple[Call, int]]] = {}

    def earliest(call: Call) -> int:
        before = [(b, *entry) for b in call.reads for entry in written.get(b, ())]
        before += [(b, *entry) for b in call.writes for entry in touched.get(b, ())]
        at_once = call.meets
        return max((at + (not (at_once or call.aligned(c, b))) for b, c, at in before), default=0)

    for call in calls:
        at = earliest(call)
        if at == len(found):
            found.append([])
        found[at].append(call)
        for buffer in call.writes:
            written.setdefault(buffer, []).append((call, at))
        for buffer in {*call.reads, *call.writes}:
            touched.setdefault(buffer, []).append((call, at))
    return [Instruction(tuple(calls)) for calls in found]


def place_buffers(plan: Plan, guarded: bool = False) -> None:
    """Give arena buffers offsets, reusing memory of buffers whose last instruction has passed.

    With `guarded` nothing is reused and GUARD bytes follow every buffer.
    """
    lives: dict[Buffer, list[int]] = {}
    for at, instruction in enumerate(plan.instructions):
        for buffer in (*instruction.reads, *instruction.writes):
            if buffer.memory == "arena":
                lives.setdefault(buffer, []).append(at)
    for ref in plan.outputs:
        if ref.buffer.memory == "arena":
            lives.setdefault(ref.buffer, [0]).append(KEPT)
    spans = {
        b: (b.nbytes + GUARD, 0, KEPT) if guarded else (b.nbytes, min(used), max(used))
        for b, used in lives.items()
    }
    offsets, plan.arena_nbytes = fit(spans)
    for buffer, offset in offsets.items():
        buffer.offset = offset


def fit(lives: Mapping[Key, tuple[int, int, int]]) -> tuple[dict[Key, int], int]:
    """Offsets, and all bytes, of what has (bytes, first and last moment that it is in use).

    First fit over what is in use at the same time, largest first of what begins together.
    """
    offsets: dict[Key, int] = {}
    placed: list[tuple[int, int, int]] = []  # offset, end, last moment: of now, sorted
    most = moment = 0
    for key, (nbytes, first, last) in sorted(lives.items(), key=lambda i: (i[1][1], -i[1][0])):
        size = -(-nbytes // ALIGNMENT) * ALIGNMENT
        if first > moment:
            moment, placed = first, [each for each in placed if each[2] >= first]
        offsets[key] = _first_fit(placed, size)
        insort(placed, (offsets[key], offsets[key] + size, last))
        most = max(most, offsets[key] + size)
    return offsets, most


def _first_fit(placed: Sequence[tuple[int, int, int]], size: int) -> int:
    at = 0
    for offset, end, _ in placed:
        if offset - at >= size:
            break
        at = max(at, end)
    return at
