"""Lowering: one rule per op turns nodes into instructions over buffers.

Rules are registered by op name in the files that mirror `ops/` (norm.py, matmul.py, ...). A rule
says which kernel, with which arguments; buffers, barriers and memory are decided here.
"""

from __future__ import annotations

from collections.abc import Callable

from runtime.backends.cpu.kernel import Kernel, arguments_of
from runtime.backends.cpu.passes import prepare
from runtime.backends.cpu.plan import Buffer, Instruction, Plan, Ref, place_buffers, set_barriers
from runtime.backends.cpu.rewrite import Options
from runtime.ops.errors import BackendError, OpError
from runtime.ops.graph import Graph
from runtime.ops.registry import OPS
from runtime.ops.tensor import LEAVES, Dim, Tensor

Rule = Callable[["Lowering", Tensor], None]
RULES: dict[str, Rule] = {}

# Nodes that only exist after the passes of passes.py.
DEVICE_OPS = frozenset({
    "pack", "rms_norm_pack", "swiglu_pack", "linear", "qkv_post", "router", "router_ids",
    "expert_tiles", "pack_rows", "swiglu_pack_rows", "linear_id",
})  # fmt: skip


class Declined(Exception):  # noqa: N818  not a failure by itself
    """A rule cannot lower this node; the text says why."""


def lowers(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of some ops; an unknown or second registration fails at import."""

    def register(rule: Rule) -> Rule:
        for name in names:
            if name not in OPS and name not in DEVICE_OPS:
                raise OpError(f"cpu backend: rule for unknown op {name!r}")
            if name in RULES:
                raise OpError(f"cpu backend: two rules for op {name!r}")
            RULES[name] = rule
        return rule

    return register


class Lowering:
    """The state of lowering one graph: instructions so far and the buffer of each tensor."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.instructions: list[Instruction] = []
        self.counts: dict[tuple[str, int], int] = {}
        self.scratch_nbytes = 0
        self.router_ids: dict[Tensor, Buffer] = {}
        self._buffers: dict[Tensor, Buffer] = {}
        self._fixed: dict[tuple[str, str], Buffer] = {}
        self._counts = Buffer("count", "counts", 0)

    def emit(self, kernel: str, node: Tensor, constants: dict | None = None, **arguments) -> None:
        """Append an instruction; arguments are integers, Refs to read, or `Out(ref)` to write."""
        names = arguments_of(kernel)
        if set(names) != set(arguments):
            wrong = set(names).symmetric_difference(arguments)
            raise BackendError(f"lowering {node.op}: kernel {kernel} arguments differ: {wrong}")
        plain = {n: a.ref if isinstance(a, Out) else a for n, a in arguments.items()}
        ordered = {n: plain[n] for n in names}
        writes = [a.ref.buffer for a in arguments.values() if isinstance(a, Out)]
        updates = [a.ref.buffer for a in arguments.values() if isinstance(a, Out) and a.also_read]
        reads = [a.buffer for a in arguments.values() if isinstance(a, Ref)]
        self.instructions.append(
            Instruction(
                Kernel.of(kernel, **(constants or {})), ordered,
                tuple(dict.fromkeys(reads + updates)), tuple(dict.fromkeys(writes)), node,
                nbytes=sum(b.nbytes for b in {*reads, *writes} if b.kind != "state"),
            )
        )  # fmt: skip

    def read(self, x: Tensor) -> Ref:
        """Where a tensor (or view) lies, as float32 or int32 in memory."""
        layout = x.layout
        return Ref(self._buffer(layout.base), layout.offset * 4)

    def write(self, node: Tensor, nbytes: int | None = None) -> Out:
        """New arena memory for a node's result."""
        buffer = Buffer("arena", node.name or node.op, nbytes or node.nbytes, tensor=node)
        self._buffers[node] = buffer
        return Out(Ref(buffer))

    def alias(self, node: Tensor, buffer: Buffer) -> None:
        """The result of `node` lies in a buffer that another node wrote."""
        self._buffers[node] = buffer

    def result(self, node: Tensor) -> Buffer:
        """The buffer a node was written to."""
        return self._buffers[node]

    def weight(self, x: Tensor, form: str, key: str = "", nbytes: int = 0) -> Ref:
        """A weight in one of its forms: "raw" file bytes, "vector" float32, or "packed"."""
        if x.op not in ("weight", "constant"):
            raise Declined(f"{x!r} is computed, not a weight of the file")
        kind = "constant" if x.op == "constant" else form
        return Ref(self._named(kind, key or x.name, nbytes or x.nbytes, x))

    def state(self, x: Tensor) -> Ref:
        """Pages of a state leaf."""
        return Ref(self._named("state", x.base.name, x.nbytes, x.base))

    def scratch(self, nbytes: int) -> Ref:
        """Memory that lives for one instruction; all instructions share the largest."""
        self.scratch_nbytes = max(self.scratch_nbytes, nbytes)
        return Ref(self._named("scratch", "scratch", 0, None))

    def step(self, name: str) -> Ref:
        """A step input that the program makes itself, such as attention tiles."""
        return Ref(self._named("input", name, 0, None))

    def count(self, dim: str, factor: int = 1) -> Ref:
        """The address of a live count: how many of `dim` this step has, times `factor`."""
        slot = self.counts.setdefault((dim, factor), len(self.counts))
        return Ref(self._counts, slot * 8)

    def live(self, x: Tensor, factor: int = 1) -> Ref:
        """The live rows of x: its first axis times `factor` rows per element."""
        first = x.shape[0] if x.ndim else 1
        name = first.name if isinstance(first, Dim) else f"={int(first)}"
        return self.count(name, factor)

    def rows(self, x: Tensor) -> tuple[Ref, int, Ref, int]:
        """x as rows of its last axis: address, row length, live count, row stride."""
        strides, shape = x.layout.strides, x.shape
        if x.ndim == 1:
            return self.read(x), int(shape[0]), self.count("=1"), int(shape[0])
        if strides[-1] != 1 and shape[-1] != 1:
            raise Declined(f"rows of {x!r} are not contiguous")
        step = strides[-2]
        for axis in range(x.ndim - 2):
            if strides[axis] != strides[axis + 1] * shape[axis + 1] and shape[axis] != 1:
                raise Declined(f"axes of {x!r} do not merge into rows")
        factor = 1
        for n in shape[1:-1]:
            factor *= int(n)
        return self.read(x), int(shape[-1]), self.live(x, factor), int(step)

    def tokens(self, x: Tensor) -> tuple[Ref, int, Ref, int]:
        """x as one row per element of its first axis: address, row length, live, row stride."""
        tail = 1
        for n, stride in zip(reversed(x.shape[1:]), reversed(x.layout.strides[1:]), strict=True):
            if stride != tail and n != 1:
                raise Declined(f"a row of {x!r} is not contiguous")
            tail *= int(n)
        return self.read(x), tail, self.live(x), int(x.layout.strides[0])

    def _buffer(self, base: Tensor) -> Buffer:
        if base in self._buffers:
            return self._buffers[base]
        if base.op == "input":
            return self._named("input", base.name, base.nbytes, base)
        if base.op == "constant":
            return self._named("constant", base.name, base.nbytes, base)
        if base.op == "weight":
            return self._named("vector", base.name, base.nbytes, base)
        if base.op == "state":
            return self._named("state", base.name, base.nbytes, base)
        raise BackendError(f"lowering reads {base!r} before anything wrote it")

    def _named(self, kind: str, key: str, nbytes: int, tensor: Tensor | None) -> Buffer:
        if (kind, key) not in self._fixed:
            self._fixed[kind, key] = Buffer(kind, key, nbytes, tensor=tensor)
        return self._fixed[kind, key]


class Out:
    """An argument that is written (and, with `also_read`, read before)."""

    def __init__(self, ref: Ref, also_read: bool = False) -> None:
        self.ref, self.also_read = ref, also_read


def lower(graph: Graph, options: Options, guarded: bool = False) -> Plan:
    """The plan of a graph: rewritten, lowered, barriers set, memory placed."""
    _load_rules()
    graph = prepare(graph, options)
    lowering = Lowering(options)
    for node in graph.nodes:
        if node.op in LEAVES or node.op in VIEWS:
            continue
        if node.op not in RULES:
            raise BackendError(
                f"cpu backend has no kernel for op {node.op!r} ({node!r}); "
                f"it has {', '.join(sorted(RULES))}"
            )
        try:
            RULES[node.op](lowering, node)
        except Declined as reason:
            raise BackendError(f"cpu backend cannot run {node.op} ({node!r}): {reason}") from None
    set_barriers(lowering.instructions)
    kept = tuple(o for o in graph.outputs if o.base.op != "state")
    plan = Plan(
        graph.name, lowering.instructions, [lowering.read(o) for o in kept], kept,
        lowering.counts, scratch_nbytes=lowering.scratch_nbytes,
    )  # fmt: skip
    place_buffers(plan, guarded)
    return plan


VIEWS = frozenset(name for name, op in OPS.items() if op.view)


def _load_rules() -> None:
    from runtime.backends.cpu import (  # noqa: F401
        attention,
        elementwise,
        matmul,
        moe,
        norm,
        rope,
        rows,
    )
